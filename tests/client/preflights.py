"""Preflights for tests."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from intramural.client.preflight import Check, Preflight, run_checks
from intramural.core.federation import FederationConfig
from intramural.core.site import load_site
from tests.tiny import Row, rows, site

NOW = datetime(2026, 12, 1, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)
SECRET = "Xylophonitis of the left ear"
"""Content of a record, which no check may tell."""


def own(folder: Path, records: list[Row] | None = None, **sections: Any) -> Path:
    return site(folder, "st-elsewhere", rows()[:40] if records is None else records, **sections)


def checks(
    place: Path, config: FederationConfig | None = None, **changes: Any
) -> dict[str, list[Check]]:
    """Return all checks, by name."""
    plain: dict[str, Any] = {"site_file": place, "site": load_site(place), "now": NOW}
    plain["federation"] = config
    found: dict[str, list[Check]] = {}
    for check in run_checks(Preflight(**plain | changes)):
        assert SECRET not in f"{check}"
        found.setdefault(check.name, []).append(check)
    return found


def only(found: dict[str, list[Check]], name: str) -> Check:
    (check,) = found[name]
    return check


def states(found: dict[str, list[Check]]) -> dict[str, str]:
    return {name: several[0].state for name, several in found.items()}
