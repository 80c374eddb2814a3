"""Under [privacy], whatever fails before the charge is on disk: no record is read, none trains."""

import errno
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from intramural.client.agent import SiteAgent
from intramural.core.journal import utc_now
from intramural.core.messages import Hello, Refusal, Reply, TrainRequest, Welcome
from intramural.privacy.ledger import Ledger
from tests.client.test_guard import METRICS, PURPOSES, asked, kinds, spied
from tests.client.test_private_agent import agent
from tests.models.builders import base_of
from tests.privacy.ledgers import charge

RELATIVE = {
    "deberta, relative": "deberta.encoder.layer.0.attention.self.pos_key_proj.weight",
    "mpnet": "mpnet.encoder.relative_attention_bias.weight",
}
"""Models of which a pass alone shows the parameter that cannot be clipped."""


def refused(reply: Reply, reason: str) -> str:
    assert isinstance(reply, Refusal), reply
    assert reply.reason == reason
    return reply.detail


def greeted(of: SiteAgent) -> Reply:
    return of.answer(Hello(manifest=of.federation.digest))


def trained_unasked(of: SiteAgent) -> Reply:
    """Ask for a round without a greeting, or a look at the model, before it."""
    vector = np.zeros(1, dtype=np.float32)
    request = TrainRequest(manifest=of.federation.digest, round=1, layout="any", vector=vector)
    return of.answer(request)


@pytest.mark.parametrize("ask", [greeted, trained_unasked])
@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.parametrize("kind", RELATIVE)
def test_what_cannot_be_clipped_is_refused_by_name_unread_and_uncharged(
    tmp_path: Path,
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    engine: str,
    ask: Callable[[SiteAgent], Reply],
) -> None:
    base = base_of(kind, bert, tmp_path / "base")
    of = agent(tmp_path, base, exchange={"kind": "full"}, privacy={"engine": engine})
    seen = spied(of.site.ledger_file, monkeypatch)
    assert refused(ask(of), "unclippable").startswith(RELATIVE[kind])
    assert seen == []
    assert not of.site.ledger_file.exists()  # not even begun


def no_space(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("purpose", PURPOSES)
def test_on_a_full_disk_no_record_is_read_and_with_space_again_the_site_goes_on(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    of = agent(tmp_path, bert, privacy=METRICS)
    assert isinstance(greeted(of), Welcome)
    before = of.site.ledger_file.read_bytes()
    with monkeypatch.context() as patch:
        seen = spied(of.site.ledger_file, patch)
        patch.setattr(os, "fsync", no_space)
        assert "No space left" in refused(asked(of, purpose), "ledger")
        assert seen == []
    assert of.site.ledger_file.read_bytes() == before
    assert not isinstance(asked(of, purpose), Refusal)
    assert kinds(of.site.ledger_file) == ["opened", "charged", "settled"]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_by_a_clock_that_runs_back_no_record_is_read(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    of = agent(tmp_path, bert, privacy=METRICS)
    ahead = Ledger(
        of.site.ledger_file,
        site="a",
        data=of.site.data_name,
        now=lambda: utc_now() + timedelta(hours=1),
    )
    ahead.charge(charge(), epsilon_lifetime=None, delta=1e-5)
    before = of.site.ledger_file.read_bytes()
    seen = spied(of.site.ledger_file, monkeypatch)
    assert "behind the last entry" in refused(asked(of, purpose), "ledger")
    assert seen == []
    assert of.site.ledger_file.read_bytes() == before


def test_a_full_disk_is_told_at_the_greeting_and_passes(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = agent(tmp_path, bert)
    assert isinstance(greeted(of), Welcome)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device; free space" in refused(greeted(of), "ledger")
    assert isinstance(greeted(of), Welcome)
    assert not list(of.site.ledger_file.parent.glob("*.probe"))
