"""Guard: what is charged, when, at which delta and relation, and whose rows are one unit's."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import intramural.client.guard
import intramural.data.task_records
from intramural.client.agent import SiteAgent
from intramural.client.guard import FAR_ABOVE, Guard
from intramural.core.errors import BudgetExhausted, Refused
from intramural.core.messages import Refusal, Reply
from intramural.core.metrics import Sums
from intramural.core.site import load_site
from intramural.data.records import Record
from intramural.privacy.ledger import Ledger
from intramural.privacy.random import SecureRandom
from intramural.privacy.statement import statement_of
from tests.client.test_private_agent import (
    EQUAL,
    PRIVACY,
    SEEDED,
    agent,
    evaluation,
    train,
    updated,
)
from tests.reference.pld import Part, pld_epsilon
from tests.tiny import Json, federation, rows, site

RUN = "run-1"
METRICS: Json = {"metrics_noise": 4.0}
ROUND: Part = (8 / 60, 1.0, 2)
"""A round of `PRIVACY`: two steps, batch 8 of nominal 60, noise 1."""
EVALUATION: Part = (1.0, 4.0, 1)
"""An evaluation of `METRICS`: every record, once."""
PURPOSES = ["train", "metrics"]


def guard(
    folder: Path,
    base: Path = Path("none"),
    *,
    privacy: Json | None = None,
    policy: Json | None = None,
    **sections: Any,
) -> Guard:
    """Return a guard; what is charged needs a base model."""
    config = federation(base, privacy=PRIVACY | (privacy or {}), strategy=EQUAL, **sections)
    written = site(folder, "a", rows()[:4], policy={"require_privacy": True} | (policy or {}))
    return Guard(load_site(written), config)


def use(of: Guard, purpose: str, *, round_: int = 1) -> AbstractContextManager[Any]:
    if purpose == "train":
        return of.charged(round_, run=RUN)
    return of.charged_metrics(round_, run=RUN)


def on_disk(path: Path) -> list[tuple[str, Json]]:
    """Return the ledger's kinds and bodies as they lie in the file, by json alone."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["kind"], line["body"]) for line in lines]


def kinds(path: Path) -> list[str]:
    return [kind for kind, _ in on_disk(path)]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_the_work_finds_its_own_charge_on_disk_and_unsettled(
    tmp_path: Path, bert: Path, purpose: str
) -> None:
    of = guard(tmp_path, bert, privacy=METRICS)
    for number in (1, 2):
        with use(of, purpose, round_=number):
            before = on_disk(of.ledger.path)
            assert [kind for kind, _ in before][2 * number - 1 :] == ["charged"]
            told = before[-1][1]
            assert (told["purpose"], told["round"], told["run_id"]) == (purpose, number, RUN)
        assert kinds(of.ledger.path) == ["opened"] + ["charged", "settled"] * number
        assert on_disk(of.ledger.path)[-1][1]["outcome"] == "done"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_work_that_the_lifetime_budget_does_not_bear_never_begins(
    tmp_path: Path, bert: Path, purpose: str
) -> None:
    of = guard(tmp_path, bert, privacy=METRICS, policy={"epsilon_lifetime": 0.1})
    begun = []
    with pytest.raises(BudgetExhausted), use(of, purpose):
        begun.append(purpose)
    assert begun == []
    assert kinds(of.ledger.path) == ["opened"]


def spied(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Note what the ledger on disk holds whenever records are read or a number is drawn."""
    seen: list[tuple[str, list[str]]] = []

    def noting(place: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(place, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            seen.append((name, kinds(ledger)))
            return real(*arguments, **named)

        monkeypatch.setattr(place, name, noted)

    noting(intramural.data.task_records, "read_records")
    noting(SecureRandom, "choose")
    noting(SecureRandom, "normal")
    return seen


def asked(of: SiteAgent, purpose: str) -> Reply:
    return train(of) if purpose == "train" else of.answer(evaluation(of))


@pytest.mark.parametrize(
    ("purpose", "uses"),
    [("train", {"read_records", "choose", "normal"}), ("metrics", {"read_records", "normal"})],
)
def test_a_site_reads_samples_and_noises_only_under_a_charge_on_disk(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, purpose: str, uses: set[str]
) -> None:
    of = agent(tmp_path, bert, privacy=METRICS)
    seen = spied(of.site.ledger_file, monkeypatch)
    assert not isinstance(asked(of, purpose), Refusal)
    assert {name for name, _ in seen} == uses
    assert [held for _, held in seen] == [["opened", "charged"]] * len(seen)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_site_whose_budget_is_spent_reads_samples_and_noises_nothing(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    of = agent(tmp_path, bert, privacy=METRICS, policy={"epsilon_lifetime": 0.1})
    seen = spied(of.site.ledger_file, monkeypatch)
    reply = asked(of, purpose)
    assert isinstance(reply, Refusal)
    assert reply.reason == "budget-exhausted"
    assert seen == []


@pytest.mark.parametrize(("purpose", "part"), [("train", ROUND), ("metrics", EVALUATION)])
@pytest.mark.parametrize(("delta_lifetime", "borne"), [(1e-3, True), (1e-8, False)])
def test_the_lifetime_budget_is_read_at_the_sites_own_delta(
    tmp_path: Path, bert: Path, purpose: str, part: Part, delta_lifetime: float, borne: bool
) -> None:
    at_the_sites = pld_epsilon(part, delta=delta_lifetime)
    at_the_federations = pld_epsilon(part, delta=1e-5)
    assert (at_the_sites < at_the_federations) == borne
    # halfway: the budget bears the charge at one of the two deltas, and not at the other
    budget = (at_the_sites + at_the_federations) / 2
    policy = {"epsilon_lifetime": budget, "delta_lifetime": delta_lifetime}
    of = guard(tmp_path, bert, privacy=METRICS, policy=policy)
    with nullcontext() if borne else pytest.raises(BudgetExhausted), use(of, purpose):
        pass
    assert kinds(of.ledger.path) == ["opened"] + ["charged", "settled"] * borne


@pytest.mark.parametrize("relation", ["add-remove", "replace-one"])
def test_charges_and_statement_are_the_federations_relation(
    tmp_path: Path, bert: Path, relation: str
) -> None:
    of = guard(tmp_path, bert, privacy={"relation": relation} | METRICS)
    with use(of, "train"), use(of, "metrics"):
        pass
    assert [c["relation"] for kind, c in on_disk(of.ledger.path) if kind == "charged"] == [
        relation, relation
    ]  # fmt: skip
    ledger = Ledger(of.ledger.path, site=of.ledger.site, data=of.ledger.data)
    told = statement_of(ledger, delta=1e-5, run=RUN)
    assert told["relation"] == relation
    expected = pld_epsilon(ROUND, EVALUATION, delta=1e-5, relation=relation)
    assert told["epsilon"] == pytest.approx(expected, rel=1e-4)
    other = {"add-remove": "replace-one", "replace-one": "add-remove"}[relation]
    # or the line above would show nothing: the relations differ by far more than 1e-4
    assert pld_epsilon(ROUND, EVALUATION, delta=1e-5, relation=other) != pytest.approx(
        expected, rel=0.05
    )


SUMS = Sums(
    counts={
        "confusion": np.array([40_000, 10_000, 10_000, 40_000]),
        "loss": np.array([7]),
        "examples": np.array([100_000]),
    }
)
"""100,000 records, 80,000 of them right."""


def released(of: Guard, times: int) -> NDArray[np.int64]:
    """Return (correct, examples) of so many releases of `SUMS` within one evaluation."""
    with of.charged_metrics(1, run=RUN) as noised:
        found = [noised(SUMS).counts for _ in range(times)]
    return np.array([[int(c["correct"][0]), int(c["examples"][0])] for c in found])


def test_what_an_evaluation_releases_has_the_noise_that_was_charged(
    tmp_path: Path, bert: Path
) -> None:
    of = guard(tmp_path, bert, privacy={"metrics_noise": 20.0}, policy=SEEDED)
    draws = released(of, 2000)
    charge = on_disk(of.ledger.path)[1][1]
    assert (charge["purpose"], charge["noise_multiplier"]) == ("metrics", 20.0)
    # one record moves both counts by 1, a norm of sqrt(2); rounding adds 1/12 to the variance
    expected = sqrt((20.0 * sqrt(2.0)) ** 2 + 1 / 12)
    np.testing.assert_allclose(draws.std(axis=0), expected, rtol=5 / sqrt(2 * 2000))
    np.testing.assert_allclose(draws.mean(axis=0), [80_000, 100_000], atol=5 * 28.3 / sqrt(2000))


def test_evaluations_noise_is_new_each_time_where_the_charge_says_private(
    tmp_path: Path, bert: Path
) -> None:
    # four counts of sd 28 are the same twice with a probability of (2 sqrt(pi) 28)**-4 = 1e-8
    sites = [guard(tmp_path / name, bert, privacy={"metrics_noise": 20.0}) for name in "ab"]
    one, other = (released(of, 2) for of in sites)
    again = released(sites[0], 2)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, again)
    for of in sites:
        told = [body for kind, body in on_disk(of.ledger.path) if kind == "charged"]
        assert all(charge["is_private"] for charge in told)


def records(persons: str) -> list[Record]:
    """Return one record a letter, of the person of that letter."""
    return [Record(text="t", target="mental", person=person) for person in persons]


PERSONS: Json = {"unit": "person", "nominal_persons": 60}


@pytest.mark.parametrize(
    ("cap", "expected"),
    [
        (1, [[0], [1], [3]]),
        (2, [[0, 2], [1, 5], [3]]),
        (3, [[0, 2, 4], [1, 5], [3]]),
    ],
)
def test_a_person_is_one_unit_of_no_more_rows_than_the_cap(
    tmp_path: Path, cap: int, expected: list[list[int]]
) -> None:
    of = guard(tmp_path, privacy=PERSONS | {"records_per_person": cap})
    found = of.units(records("abacaba"))  # a: rows 0, 2, 4 and 6; b: 1 and 5; c: 3
    assert [unit.tolist() for unit in found] == expected


def test_a_record_is_one_unit_whoever_it_is_of(tmp_path: Path) -> None:
    found = guard(tmp_path).units(records("aba"))
    assert [unit.tolist() for unit in found] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("privacy", "persons", "told"),
    [
        # 60 nominal records: beside 29 they are more than twice as many, beside 30 they are not
        ({}, "a" * 29, "privacy.nominal_records = 60 is far above"),
        ({}, "a" * 30, ""),
        # persons are held against persons, however many records they have
        (PERSONS | {"nominal_persons": 5}, "aaab" * 20, "privacy.nominal_persons = 5 is far above"),
        (PERSONS | {"nominal_persons": 4, "nominal_records": 10_000}, "abab", ""),
    ],
    ids=["far fewer records", "half the records", "far fewer persons", "half the persons"],
)
def test_a_site_is_told_once_that_the_nominal_count_is_far_above_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, privacy: Json, persons: str, told: str
) -> None:
    more = {"records_per_person": 3} if "unit" in privacy else {}
    of = guard(tmp_path, privacy=privacy | more, training={"batch_size": 4})
    for _ in range(2):
        of.units(records(persons))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("intra")]
    assert len(said) == bool(told)
    if told:
        assert told in said[0]
        assert str(len(persons)) not in said[0]  # a log tells of no count of records


def test_what_a_site_is_told_of_its_count_leaves_its_reply_as_it_was(
    tmp_path: Path,
    bert: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replies = []
    for far_above in (FAR_ABOVE, 1e9):
        monkeypatch.setattr(intramural.client.guard, "FAR_ABOVE", far_above)
        privacy = {"nominal_records": 6000}
        of = agent(tmp_path / str(far_above), bert, privacy=privacy, policy=SEEDED)
        replies.append(updated(train(of)))
        heard = [line.getMessage() for line in caplog.records]
        assert [line for line in heard if "nominal_records = 6000" in line] == heard
        assert len(heard) == 1  # of the first alone
    told, silent = replies
    assert told.delta.tobytes() == silent.delta.tobytes()
    for name in ("weight", "loss", "seconds", "ledger_entries", "layout", "round"):
        assert getattr(told, name) == getattr(silent, name)


def test_a_person_of_many_records_moves_a_step_by_no_more_than_the_clip_norm(
    tmp_path: Path, bert: Path
) -> None:
    # 'p' alone is on the train side, and always drawn: rate 8 / 8; one step at 0.1, divisor 8
    privacy = PERSONS | {"nominal_persons": 8, "records_per_person": 12, "clip_norm": 0.01}
    of = agent(
        tmp_path,
        bert,
        privacy=privacy | {"noise_multiplier": 1e-6},
        records=[row | {"person": "p" if n < 12 else "u"} for n, row in enumerate(rows()[:13])],
        data={"person": "person"},
        policy=SEEDED | {"epsilon_run": 1e15},
        training={"local_steps": 1},
    )
    assert [record.person for record in of.records_of("train")] == ["p"] * 12
    norm = float(np.linalg.norm(updated(train(of)).delta))
    # the records' gradients are far longer than 0.01: clipped one by one they would add up to more
    assert norm == pytest.approx(0.1 * 0.01 / 8, rel=1e-3)


def test_a_federation_that_hardly_hides_is_refused_whichever_request_comes_first(
    tmp_path: Path, bert: Path
) -> None:
    told = train(agent(tmp_path, bert, privacy={"noise_multiplier": 0.01}))
    assert isinstance(told, Refusal)
    assert told.reason == "refused"
    assert "above policy.epsilon_run = 10;" in told.detail
    assert not list(tmp_path.rglob("ledger-*"))


def test_the_cost_of_a_run_is_read_at_the_sites_delta_with_its_evaluations(tmp_path: Path) -> None:
    rounds = 2
    parts = [(rate, noise, steps * rounds) for rate, noise, steps in (ROUND, EVALUATION)]
    parts[1] = (1.0, 4.0, rounds + 1)  # the last round's model is evaluated on the test split too
    cost = pld_epsilon(*parts, delta=1e-4)
    policy = {"delta_lifetime": 1e-4}
    guard(tmp_path / "in", privacy=METRICS, policy=policy | {"epsilon_run": 1.001 * cost})
    with pytest.raises(Refused, match=r"above policy\.epsilon_run"):
        guard(tmp_path / "out", privacy=METRICS, policy=policy | {"epsilon_run": 0.999 * cost})
