"""Under [privacy] each reply tells the ledger's length and head, so that a rollback is noticed."""

from pathlib import Path

import pytest

from intramural.client.agent import SiteAgent
from intramural.core.journal import scan
from intramural.core.messages import Evaluated, Hello, Update, Welcome
from intramural.core.site import load_site
from tests.client.test_private_agent import SEEDED, agent, evaluation, train
from tests.tiny import Json, federation, rows, site

METRICS: Json = {"metrics_noise": 4.0}
Told = tuple[int | None, str | None]


def told(reply: object) -> Told:
    assert isinstance(reply, Welcome | Update | Evaluated), reply
    return reply.ledger_entries, reply.ledger_head


def greeted(of: SiteAgent) -> Told:
    return told(of.answer(Hello(manifest=of.federation.digest)))


def on_disk(of: SiteAgent) -> Told:
    """Return what lies in the ledger's file, as a scan of its chain has it."""
    entries = scan(of.site.ledger_file).entries
    return len(entries), entries[-1].digest


def test_greeting_training_and_evaluation_tell_the_ledger_as_it_then_is(
    tmp_path: Path, bert: Path
) -> None:
    of = agent(tmp_path, bert, privacy=METRICS)
    # opened; then a charge and its settlement for each answer that costs, and none for a greeting
    assert greeted(of) == on_disk(of)
    assert on_disk(of)[0] == 1
    assert told(train(of)) == on_disk(of)
    assert on_disk(of)[0] == 3
    assert greeted(of) == on_disk(of)
    assert told(of.answer(evaluation(of))) == on_disk(of)
    assert on_disk(of)[0] == 5
    assert greeted(of) == on_disk(of)
    assert on_disk(of)[0] == 5


def test_a_greeting_tells_what_another_run_charged_meanwhile(tmp_path: Path, bert: Path) -> None:
    one = agent(tmp_path, bert, policy=SEEDED)
    other = SiteAgent(one.site, one.federation)
    assert greeted(one)[0] == 1
    assert told(train(other))[0] == 3
    assert greeted(one) == on_disk(one)
    assert greeted(one)[0] == 3


def test_a_greeting_leaves_out_a_charge_that_was_cut_off(tmp_path: Path, bert: Path) -> None:
    # its digest has no nonce: who knows the entry before could try out the charge's time
    of = agent(tmp_path, bert)
    assert told(train(of))[0] == 3
    before = greeted(of)
    guard = of._guarded()
    guard.ledger.charge(guard._charge(2, run=""), epsilon_lifetime=None, delta=1e-5)
    assert on_disk(of)[0] == 4
    assert greeted(of) == before == (3, scan(of.site.ledger_file).entries[2].digest)
    assert told(train(of, round_=2)) == on_disk(of)
    assert greeted(of) == on_disk(of)
    assert on_disk(of)[0] == 6


@pytest.mark.parametrize("split", ["train", "validation"])
def test_without_privacy_no_ledger_is_told_of(tmp_path: Path, bert: Path, split: str) -> None:
    of = SiteAgent(load_site(site(tmp_path, "a", rows()[:60])), federation(bert))
    reply = train(of) if split == "train" else of.answer(evaluation(of))
    assert told(reply) == greeted(of) == (None, None)
    assert not of.site.ledger_file.exists()
