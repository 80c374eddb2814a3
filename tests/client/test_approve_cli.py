"""`intramural client approve`: what a person is shown, and what counts as a yes."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from intramural.client.approve_cli import approvals_of, approve_command
from intramural.core.errors import AwaitsApproval, ConfigError, Refused
from intramural.core.federation import FederationConfig
from intramural.core.site import load_site
from tests.client.envelopes import PRIVACY, envelope_of
from tests.tiny import Json, federation, rows, site

APP = typer.Typer()
APP.command()(approve_command)


def made(**sections: Json) -> FederationConfig:
    plain: Json = {"strategy": {"weights": "equal"}, "privacy": PRIVACY}
    return federation(Path("nowhere"), **plain | sections)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return site(tmp_path, "st-elsewhere", rows()[:2], policy={"require_privacy": True})


def admit(place: Path, config: FederationConfig) -> None:
    approvals_of(place, load_site(place)).admit(envelope_of(config), config)


def propose(place: Path, config: FederationConfig) -> str:
    with pytest.raises(AwaitsApproval):
        admit(place, config)
    return config.digest


def call(place: Path, *words: str, typed: str | None = None) -> str:
    return result(place, *words, typed=typed).output


def result(place: Path, *words: str, typed: str | None = None) -> Result:
    # `main` turns the errors raised here into a line and an exit code
    given = [*words, "--site", str(place)]
    return CliRunner().invoke(APP, given, input=typed, catch_exceptions=False)


def words_of(place: Path) -> str:
    """Return what --json shows in words, without deciding."""
    return " ".join(json.loads(call(place, "tiny", "--json"))["words"].values())


def files(place: Path) -> dict[str, bytes]:
    state = place.parent / "state"
    return {str(path): path.read_bytes() for path in state.rglob("*") if path.is_file()}


def test_without_a_run_what_waits_is_listed(place: Path) -> None:
    assert call(place).strip() == "nothing waits for approval"
    assert not (place.parent / "state").exists()  # who only looks leaves nothing
    digest = propose(place, made())
    assert f"{digest[7:19]}  tiny  first seen 2" in call(place)
    assert "0 of 1 approvals" in call(place)
    (row,) = json.loads(call(place, "--json"))["waiting"]
    assert (row["manifest"], row["name"], row["by"]) == (digest, "tiny", [])


def test_a_manifest_is_told_in_plain_words(place: Path) -> None:
    propose(place, made(evaluation={"every": 1}, sites={"min": 5, "quorum": 0.55}))
    text = call(place, "tiny", typed="tiny\n")
    for words in (
        'to choose one of 4 labels for a text: ["circulatory", ',
        'base model "nowhere", of any content: no digest is named; texts cut at 32 tokens',
        "an adapter of rank 2 and the head; noised, with no loss, time or record count",
        "no evaluation leaves the site",
        "2 rounds of 2 steps with 8 records each",
        "noise_multiplier 1, clip_norm 1, for sites of about 2000 records",
        "at delta 1e-05 for one record (add-remove, Poisson sampling)",
        "no lifetime limit is set",
        "the coordinator sees each update by itself",
        "5 sites or more a round",
        "may close with 3 of them",  # 0.55 x 5 = 2.75, rounded up
        "no manifest of this name is approved",
        "it keeps all of the site's own limits",
        "tiny: approved",
    ):
        assert words in text, words


def test_modules_that_travel_whole_are_named(place: Path) -> None:
    # exchange.kind = 'lora' can let out more than an adapter, if the manifest says so
    propose(place, made(exchange={"trained_modules": ["classifier", "encoder"]}))
    assert 'an adapter of rank 2 and the whole of ["classifier", "encoder"]' in words_of(place)


def test_without_privacy_it_is_told_what_that_means(tmp_path: Path) -> None:
    place = site(tmp_path, "st-elsewhere", rows()[:2])
    propose(place, federation(Path("nowhere"), evaluation={"every": 3}))
    text = words_of(place)
    assert "NONE: whoever sees an update may learn texts" in text
    assert "with the mean loss, the time, the number of records" in text
    assert "exact sums (records, loss, who was taken for what), every 3 rounds" in text


@pytest.mark.parametrize(
    ("rule", "weights", "length", "told", "untold"),
    [
        ("fedavg", "equal", {"local_epochs": 2}, "the mean loss, the time", "the number"),
        ("fednova", "equal", {"local_epochs": 2}, "steps (and so of records, to within 8)", "?"),
        ("fednova", "equal", {"local_steps": 2}, "the time, the number of steps", "of records, to"),
        ("fednova", "examples", {"local_epochs": 2}, "records, the number of steps", "to within"),
    ],
)
def test_what_tells_the_number_of_records_is_named(
    tmp_path: Path, rule: str, weights: str, length: Json, told: str, untold: str
) -> None:
    config = federation(
        Path("nowhere"),
        strategy={"rule": rule, "weights": weights},
        training={"local_steps": None} | length,
        evaluation={"every": 0},
    )
    place = site(tmp_path, "st-elsewhere", rows()[:2])
    propose(place, config)
    text = words_of(place)
    assert told in text
    assert untold not in text


def test_the_runs_name_typed_approves_it(place: Path) -> None:
    propose(place, made())
    call(place, "tiny", "--by", "Ada", typed="tiny\n")
    admit(place, made())
    assert call(place).strip() == "nothing waits for approval"


@pytest.mark.parametrize("typed", ["yes\n", "\n", "Tiny\n", "tin\n", "tiny2\n"])
def test_another_name_changes_nothing(place: Path, typed: str) -> None:
    propose(place, made())
    before = files(place)
    for refuse in ([], ["--refuse"]):
        with pytest.raises(Refused, match="nothing was changed") as caught:
            call(place, "tiny", *refuse, typed=typed)
        assert caught.value.exit_code == 3
    with pytest.raises(Refused, match="nothing was changed"):
        call(place, "tiny", "--yes-name", typed.strip() or "-")
    assert files(place) == before
    propose(place, made())


def test_no_answer_approves_nothing(place: Path) -> None:
    propose(place, made())
    before = files(place)
    assert result(place, "tiny", typed="").exit_code == 1  # the input ended
    assert files(place) == before


def test_a_digest_names_one_of_several_manifests(place: Path) -> None:
    first, second = made(), made(federation={"seed": 8})
    propose(place, first)
    propose(place, second)
    with pytest.raises(ConfigError, match="is the name of 2"):
        call(place, "tiny", "--yes-name", "tiny")
    assert "tiny: approved" in call(place, second.digest[7:15], "--yes-name", "tiny")
    admit(place, second)
    propose(place, first)


def test_the_difference_to_the_last_approved_one_is_shown(place: Path) -> None:
    propose(place, made())
    call(place, "tiny", "--yes-name", "tiny")
    propose(place, made(training={"learning_rate": 0.25, "gradient_clip": 1.0}))
    text = call(place, "tiny", "--yes-name", "tiny")
    assert f"changed since {made().digest[:19]}, the last one approved:" in text
    assert "  training.learning_rate: 0.1 -> 0.25\n" in text
    assert "  training.gradient_clip: absent -> 1.0\n" in text
    assert text.count("->") == 2


def test_what_the_policy_refuses_is_shown_and_stays_refused(tmp_path: Path) -> None:
    place = site(tmp_path, "st-elsewhere", rows()[:2], policy={"cohort_min": 3})
    propose(place, made())
    text = call(place, "tiny", "--yes-name", "tiny")
    assert "the site's own limits refuse it, approved or not:" in text
    assert "policy.cohort_min allows cohorts of 3 sites or more" in text


def test_refusing_and_withdrawing(place: Path) -> None:
    propose(place, made())
    assert "tiny: refused" in call(place, "tiny", "--refuse", typed="tiny\n")
    with pytest.raises(Refused, match="the site's people refused"):
        admit(place, made())
    assert "tiny: approved" in call(place, made().digest[7:], "--yes-name", "tiny")
    admit(place, made())
    assert "tiny: refused" in call(place, "tiny", "--refuse", "--yes-name", "tiny")
    with pytest.raises(Refused, match="the site's people refused"):
        admit(place, made())


def test_a_second_approver(tmp_path: Path) -> None:
    place = site(tmp_path, "st-elsewhere", rows()[:2], policy={"approvers": 2})
    propose(place, made())
    text = call(place, "tiny", "--by", "Ada", "--yes-name", "tiny")
    assert "tiny: noted; it waits for a second approver" in text
    assert "1 of 2 approvals" in call(place)
    with pytest.raises(Refused, match="the second approver is somebody else"):
        call(place, "tiny", "--by", "ada", "--yes-name", "tiny")
    propose(place, made())
    text = call(place, "tiny", "--by", "Grace", "--yes-name", "tiny")
    assert "approved so far by: Ada" in text
    assert "tiny: approved" in text
    admit(place, made())


def test_json_shows_all_and_decides_only_with_a_name(place: Path) -> None:
    digest = propose(place, made())
    before = files(place)
    found: dict[str, Any] = json.loads(call(place, "tiny", "--json"))
    assert files(place) == before
    assert (found["manifest"], found["status"]) == (digest, "pending")
    assert set(found["words"]) >= {"learns", "leaves", "privacy", "who else"}
    assert (found["differences"], found["violations"], found["last_approved"]) == ([], [], None)
    found = json.loads(call(place, "tiny", "--json", "--yes-name", "tiny"))
    assert found["status"] == "approved"


def test_what_the_coordinator_wrote_moves_no_cursor(place: Path) -> None:
    hostile = "ok\x1b[2J\x1b[1;1H\u202eharmless"
    labels = ["circulatory", hostile]
    propose(place, made(task={"labels": labels}, model={"base": f"\r{hostile}"}))
    text = call(place, "tiny", "--yes-name", "tiny")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\r" not in text
    assert "\\u202eharmless" in text


def test_an_unknown_run_is_wrong_use(place: Path) -> None:
    with pytest.raises(ConfigError, match="no such manifest waits") as caught:
        call(place, "other", "--yes-name", "other")
    assert caught.value.exit_code == 2
