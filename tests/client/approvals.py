"""Stores of approvals for tests."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from intramural.client.approval import Approvals
from intramural.core.errors import AwaitsApproval
from intramural.core.federation import FederationConfig
from intramural.core.journal import scan
from intramural.core.site import SitePolicy
from tests.client.envelopes import PRIVACY, envelope_of
from tests.privacy.ledgers import clock
from tests.tiny import Json, federation

NOW = clock()


def made(**sections: Json) -> FederationConfig:
    plain: Json = {"strategy": {"weights": "equal"}, "privacy": PRIVACY}
    return federation(Path("base"), **plain | sections)


def store(folder: Path, *, now: Callable[[], datetime] = NOW, **keys: object) -> Approvals:
    return Approvals(
        folder, policy=SitePolicy.model_validate(keys), journal=folder / "journal.jsonl", now=now
    )


def ask(approvals: Approvals, config: FederationConfig) -> None:
    approvals.admit(envelope_of(config), config)


def proposed(approvals: Approvals, config: FederationConfig) -> str:
    """Have a manifest proposed; return its digest."""
    with pytest.raises(AwaitsApproval):
        ask(approvals, config)
    return config.digest


def kinds(folder: Path) -> list[str]:
    return [entry.kind for entry in scan(folder / "journal.jsonl").entries]


def place_of(folder: Path, digest: str) -> list[str]:
    """Return the folders in which a manifest's file lies."""
    return sorted(path.parent.name for path in folder.glob(f"*/{digest[7:]}.json"))
