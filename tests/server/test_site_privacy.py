"""Site-level privacy at the coordinator: each aggregate is charged first, and none forgotten."""

from math import erfc, exp, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from intramural.core.errors import Interrupted, JournalError
from intramural.core.federation import FederationConfig
from intramural.core.journal import Journal, scan
from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.server.checkpoint import load_checkpoint
from intramural.server.site_privacy import (
    CHARGED,
    charge,
    check_charges,
    secret_noise,
    site_statement,
)
from intramural.server.watcher import Watcher
from intramural.strategies.registry import make_rule
from intramural.strategies.site_dp import Noise
from tests.rounds.runs import run
from tests.server.fakes import LAYOUT, Done, coordinate, faulty, grid_of, honest, small
from tests.server.test_coordinator import poisoned
from tests.tiny import federation, sites


def private(*, noise_multiplier: float = 3.5355, **sections: Any) -> FederationConfig:
    """Return a federation of three sites that hides each of them."""
    return small(
        strategy={"weights": "equal"},
        site_privacy={"clip_norm": 1.0, "noise_multiplier": noise_multiplier, "delta": 1e-5},
        **sections,
    )


def silent(size: int, std: float) -> Vector:
    return np.zeros(size, dtype=np.float32)


def work(folder: Path, config: FederationConfig, *, noise: Noise = silent, **changes: Any) -> Done:
    """Run a coordinator that hides its sites, over honest sites unless told otherwise."""
    grid = changes.pop("grid", None) or grid_of(honest)
    return coordinate(folder, config, grid, rule=make_rule(config, LAYOUT, noise=noise), **changes)


def statement(folder: Path, config: FederationConfig) -> dict[str, Any]:
    told = site_statement(config, scan(folder / "journal.jsonl").entries)
    assert told is not None
    return told


def charged(folder: Path, config: FederationConfig, releases: int) -> dict[str, Any]:
    """Return the statement of so many releases."""
    journal = Journal(folder / "journal.jsonl")
    for round_ in range(releases):
        charge(journal, config, round_=round_ + 1)
    journal.close()
    return statement(folder, config)


def delta_of(epsilon: float, mu: float) -> float:
    """Return delta of a Gaussian mechanism of sensitivity mu and noise 1.

    Source: Balle and Wang 2018, theorem 8, https://arxiv.org/abs/1805.06530.
    """

    def below(x: float) -> float:
        return erfc(-x / sqrt(2)) / 2

    return below(mu / 2 - epsilon / mu) - exp(epsilon) * below(-mu / 2 - epsilon / mu)


def epsilon_of(mu: float, delta: float) -> float:
    """Return the epsilon at which `delta_of` is delta."""
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, mu) > delta else (low, middle)
    return high


@pytest.mark.parametrize(
    ("releases", "noise_multiplier", "about"),
    [
        (50, 50**0.5 / 2, 10.0),  # mu = sqrt(50) / z = 2
        (1, 1.0, 4.38),
        (10, 10.0, 1.18),
    ],
)
def test_epsilon_is_that_of_one_gaussian_with_mu_sqrt_t_over_z(
    tmp_path: Path, releases: int, noise_multiplier: float, about: float
) -> None:
    told = charged(tmp_path, private(noise_multiplier=noise_multiplier), releases)
    mu = sqrt(releases) / noise_multiplier
    exact = epsilon_of(mu, 1e-5)
    assert exact == pytest.approx(about, abs=0.05)
    assert exact <= told["epsilon"] <= exact * 1.001  # discretised upwards, and hardly
    step = pld.from_gaussian_mechanism(noise_multiplier, value_discretization_interval=1e-4)
    theirs = step.self_compose(releases).get_epsilon_for_delta(1e-5)
    assert told["epsilon"] == pytest.approx(theirs, rel=0.005)


def test_the_statement_has_its_keys_and_says_its_price(tmp_path: Path) -> None:
    told = charged(tmp_path, private(noise_multiplier=6.0), 2)
    words, accountant = told.pop("words"), told.pop("accountant")
    assert told.pop("epsilon") == pytest.approx(epsilon_of(sqrt(2) / 6, 1e-5), rel=1e-3)
    assert told == {
        "delta": 1e-5,
        "unit": "site",
        "relation": "add-remove",
        "sampler": "none",
        "noise_multiplier": 6.0,
        "clip_norm": 1.0,
        "releases": 2,
    }
    assert accountant.startswith("PLD, dp-accounting ")
    assert "over 2 releases" in words
    assert "standard deviation 2 on every parameter of the mean of 3 updates" in words  # 6 * 1 / 3
    assert "Not covered: metrics" in words
    assert "promises little" not in words
    assert "{" not in words


def test_a_large_epsilon_is_told_to_be_one(tmp_path: Path) -> None:
    assert (
        "An epsilon above 10 promises little."
        in (charged(tmp_path, private(noise_multiplier=0.5), 2)["words"])
    )


def test_a_run_charges_each_round_once_and_divides_by_a_constant(tmp_path: Path) -> None:
    config = private()
    done = work(tmp_path, config)
    # each site moves all 7 by its number, clipped to length 1; the sum over sites.min = 3
    np.testing.assert_allclose(done.outcome.vector, np.full(7, 2 / sqrt(7)), rtol=1e-6)
    kinds = [e.kind for e in done.journal]
    assert kinds == ["opened", CHARGED, "committed"] * 2
    assert statement(tmp_path, config)["releases"] == 2


def test_the_charge_is_on_disk_when_the_noise_is_drawn(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def looking(size: int, std: float) -> Vector:
        entries = scan(tmp_path / "journal.jsonl").entries
        seen.append([e.body["round"] for e in entries if e.kind == CHARGED])
        return silent(size, std)

    work(tmp_path, private(), noise=looking)
    assert seen == [[1], [1, 2]]


def test_a_charge_that_cannot_be_written_stops_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, drawn = Journal.append, []

    def full(self: Journal, kind: str, **body: Any) -> Any:
        if kind == CHARGED:
            raise JournalError("no space left; free space")
        return plain(self, kind, **body)

    def watched(size: int, std: float) -> Vector:
        drawn.append(size)
        return silent(size, std)

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(JournalError, match="free space"):
        work(tmp_path, private(), noise=watched)
    assert drawn == []
    assert load_checkpoint(tmp_path / "checkpoints") == (None, [])


def test_an_attempt_without_a_quorum_releases_nothing(tmp_path: Path) -> None:
    tries: list[int] = []

    def once(update: Update) -> Update:
        tries.append(update.round)
        return poisoned(update) if len(tries) == 1 else update

    config = private()
    done = work(tmp_path, config, grid=grid_of(faulty({"site-2": once})))
    kinds = [e.kind for e in done.journal]
    assert kinds.count("discarded") == 1
    assert statement(tmp_path, config)["releases"] == 2


class StopAfterSending(Watcher):
    """Stops a run once a round's arrays went out for evaluation, before it is committed."""

    def answered(self, site: str, phase: str, *, good: bool, reason: str) -> None:
        if phase == "evaluate":
            raise Interrupted("stopped by the test")


def test_a_round_thrown_away_after_its_arrays_went_out_is_counted(tmp_path: Path) -> None:
    config = private()
    for _ in range(2):  # round 1 is begun three times, and its aggregate sent each time
        with pytest.raises(Interrupted):
            work(tmp_path, config, watcher=StopAfterSending())
    work(tmp_path, config)
    told = statement(tmp_path, config)
    assert told["releases"] == 4  # rounds 1, 1, 1 and 2
    assert told["epsilon"] == pytest.approx(epsilon_of(sqrt(4) / 3.5355, 1e-5), rel=1e-3)


def test_a_journal_that_lost_charges_is_refused(tmp_path: Path) -> None:
    config = private()
    entries = work(tmp_path, config).journal
    check_charges(config, entries, committed=2)
    with pytest.raises(JournalError, match=r"no site privacy for round 2.*restore the whole"):
        check_charges(config, entries[:-2], committed=2)
    check_charges(small(), [], committed=2)


def test_without_the_table_nothing_is_charged_or_claimed(tmp_path: Path) -> None:
    config = small()
    done = coordinate(tmp_path, config, grid_of(honest))
    assert CHARGED not in {entry.kind for entry in done.journal}
    assert site_statement(config, done.journal) is None


def test_the_coordinators_noise_is_fresh_each_time() -> None:
    first, second = secret_noise(), secret_noise()
    draws = [first(1000, 2.0), first(1000, 2.0), second(1000, 2.0)]
    assert len({draw.tobytes() for draw in draws}) == 3
    assert np.std(draws) == pytest.approx(2.0, rel=0.1)


def test_a_runs_report_tells_what_it_cost(tmp_path: Path, bert: Path) -> None:
    config = federation(
        bert,
        sites={"min": 2},
        strategy={"weights": "equal"},
        site_privacy={"clip_norm": 0.1, "noise_multiplier": 1.0, "delta": 1e-5},
    )
    report = run(tmp_path / "run", config, sites(tmp_path / "sites", 2))
    told = report["site_privacy"]
    assert (told["releases"], told["unit"]) == (2, "site")
    assert told["epsilon"] == pytest.approx(epsilon_of(sqrt(2), 1e-5), rel=1e-3)
    listed = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    section = listed.split("## Keys of `site_privacy`")[1].split("\n## ")[0]
    assert all(f"| `{key}` |" in section for key in told)
