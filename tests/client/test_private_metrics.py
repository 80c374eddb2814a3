"""Evaluation under [privacy]: one unit moves what is noised by no more than the noise covers."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from intramural.client.agent import SiteAgent
from intramural.core.messages import Evaluated, Refusal
from intramural.data.records import Record
from intramural.data.split import Splits
from tests.client.test_guard import PERSONS, guard, on_disk, released, use
from tests.client.test_private_agent import EQUAL, PRIVACY, SEEDED, agent, evaluation
from tests.tiny import Json, generation, rows

NOISED: Json = {"metrics_noise": 4.0, "nominal_records": 60}
Case = tuple[str, tuple[int, ...]]
"""Whose records a split holds, a letter each, and whether the model is right about them."""


def measured(of: SiteAgent, persons: str, shares: Sequence[int]) -> NDArray[np.int64]:
    """Return (correct, examples) of an evaluation on a validation split of these records."""
    records = tuple(
        Record(text="t", target=str(share), person=person)
        for person, share in zip(persons, shares, strict=True)
    )
    of._splits = Splits(train=records, validation=records, test=records)
    found = of.evaluated_of("validation")
    return np.array([sum(int(record.target) for record in found), len(found)])


def without(case: Case, gone: str) -> Case:
    """Return a split without a person."""
    kept = [(person, share) for person, share in zip(*case, strict=True) if person != gone]
    return "".join(person for person, _ in kept), tuple(share for _, share in kept)


def cases(length: int) -> Iterator[Case]:
    """Yield all splits of so many records of a, b and c: of each person all right, or all wrong."""
    for persons in product("abc", repeat=length):
        for right in product((0, 1), repeat=3):
            yield "".join(persons), tuple(right["abc".index(person)] for person in persons)


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("cut", [None, 2, 3])
def test_one_person_moves_an_evaluation_by_no_more_than_its_sensitivity(
    tmp_path: Path, most: int, cut: int | None
) -> None:
    privacy = PERSONS | NOISED | {"records_per_person": most}
    evaluated = {} if cut is None else {"records_max": cut}
    of = agent(tmp_path, Path("none"), privacy=privacy, evaluation=evaluated)
    added, replaced, pairs = [], [], {}
    for case in cases(5):
        pairs[case] = measured(of, *case)
        for gone in "abc":
            less = without(case, gone)
            if less not in pairs:
                pairs[less] = measured(of, *less)
            added.append(pairs[case] - pairs[less])
        for one, other in ("ab", "bc", "ca"):  # the case without both, and one of them back
            replaced.append(pairs[without(case, one)] - pairs[without(case, other)])
    bound = most * sqrt(2.0)
    assert max(np.linalg.norm(added, axis=1)) == pytest.approx(bound)  # and it is no smaller
    assert max(np.linalg.norm(replaced, axis=1)) <= bound
    assert np.abs(added).max() == np.abs(replaced).max() == most


@pytest.mark.parametrize("cut", [None, 2, 3])
def test_one_record_moves_an_evaluation_by_no_more_than_its_sensitivity(
    tmp_path: Path, cut: int | None
) -> None:
    evaluated = {} if cut is None else {"records_max": cut}
    of = agent(tmp_path, Path("none"), privacy=NOISED, evaluation=evaluated)
    moves = []
    for shares in product((0, 1), repeat=5):
        for gone in range(5):
            less = shares[:gone] + shares[gone + 1 :]
            moves.append(measured(of, "a" * 5, shares) - measured(of, "a" * 4, less))
    longest = sqrt(2.0) if cut is None else 1.0  # cut, another record takes the place
    assert max(np.linalg.norm(moves, axis=1)) == longest


def test_a_persons_records_are_the_first_ones_in_the_files_order(tmp_path: Path) -> None:
    privacy = PERSONS | NOISED | {"records_per_person": 2}
    of = guard(tmp_path, privacy=privacy)
    records = [Record(text=str(n), target="t", person=p) for n, p in enumerate("abaabbc")]
    found = [record.text for record in of.bounded(records)]
    assert found == ["0", "1", "2", "4", "6"]  # a: 0 and 2; b: 1 and 4; c: 6
    assert of.bounded([]) == []


def test_a_person_of_many_records_takes_no_others_places(tmp_path: Path) -> None:
    # cut first, the list would be a's alone, and then bounded to one record: b, c and d are gone
    privacy = PERSONS | NOISED | {"records_per_person": 1}
    of = agent(tmp_path, Path("none"), privacy=privacy, evaluation={"records_max": 4})
    assert measured(of, "aaaabcd", [1] * 7).tolist() == [4, 4]


def test_without_privacy_an_evaluation_sees_the_split_as_it_is(tmp_path: Path) -> None:
    of = agent(tmp_path, Path("none"), privacy=NOISED, evaluation={"records_max": 3})
    of.federation = of.federation.model_copy(update={"privacy": None})
    assert measured(of, "aaab", [1, 0, 1, 1]).tolist() == [2, 3]
    assert not of.site.ledger_file.exists()


def test_persons_noise_is_as_large_as_their_records_and_the_charge_says_so(
    tmp_path: Path, bert: Path
) -> None:
    privacy = PERSONS | {"records_per_person": 3, "metrics_noise": 20.0}
    of = guard(tmp_path, bert, privacy=privacy, policy=SEEDED)
    draws = released(of, 2000)
    charge = on_disk(of.ledger.path)[1][1]
    assert (charge["purpose"], charge["noise_multiplier"]) == ("metrics", 20.0)
    assert (charge["unit"], charge["records_per_person"]) == ("person", 3)
    # three records move each count by 3, a norm of 3 sqrt(2); rounding adds 1/12 to the variance
    assert charge["clip_norm"] == pytest.approx(3 * sqrt(2.0))
    expected = sqrt((20.0 * 3 * sqrt(2.0)) ** 2 + 1 / 12)
    np.testing.assert_allclose(draws.std(axis=0), expected, rtol=5 / sqrt(2 * 2000))


def test_records_noise_is_charged_at_their_sensitivity(tmp_path: Path, bert: Path) -> None:
    of = guard(tmp_path, bert, privacy={"metrics_noise": 4.0})
    with use(of, "metrics"):
        pass
    assert on_disk(of.ledger.path)[1][1]["clip_norm"] == pytest.approx(sqrt(2.0))


def test_records_of_nobody_are_refused_where_persons_are_evaluated(
    tmp_path: Path, bert: Path
) -> None:
    privacy = PERSONS | {"records_per_person": 3, "metrics_noise": 4.0}
    of = agent(tmp_path, bert, privacy=privacy)  # whose site.toml names no data.person
    reply = of.answer(evaluation(of))
    assert isinstance(reply, Refusal)
    assert "name data.person in site.toml, for every row" in reply.detail


def test_a_generation_by_persons_sends_two_counts(tmp_path: Path, llama: Path) -> None:
    privacy = PRIVACY | PERSONS | {"records_per_person": 2, "metrics_noise": 1e-3}
    of = agent(
        tmp_path,
        llama,
        records=[row | {"person": str(n // 4)} for n, row in enumerate(rows()[:60])],
        data={"person": "person", "response": "title", "text": "code"},
        policy=SEEDED | {"epsilon_run": 1e9},
    )
    of = SiteAgent(of.site, generation(llama, privacy=privacy, strategy=EQUAL))
    reply = of.answer(evaluation(of))
    assert isinstance(reply, Evaluated), reply
    assert set(reply.sums.counts) == {"correct", "examples"}
    # next to no noise: two of each person's four records are counted
    validation = of.splits().validation
    assert len(validation) == 4 * len({record.person for record in validation})
    assert reply.sums.counts["examples"].tolist() == [len(validation) // 2]
