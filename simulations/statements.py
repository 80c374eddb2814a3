"""The sites' privacy statements after a simulated run: privacy.json and privacy.md."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from intramural.core.federation import FederationConfig
from intramural.core.files import write_atomic, write_json
from intramural.core.journal import scan
from intramural.core.site import SiteConfig
from intramural.privacy.ledger import Ledger
from intramural.privacy.statement import statement_markdown, statement_of
from intramural.server.commits import JOURNAL
from intramural.server.run import run_id


def write_statements(
    federation: FederationConfig, sites: Iterable[SiteConfig], *, folder: Path
) -> dict[str, Any] | None:
    """Write each site's statement, from its own ledger, and return them; None without [privacy]."""
    if federation.privacy is None:
        return None
    run = run_id(scan(folder / JOURNAL).entries)
    statements: dict[str, Any] = {}
    for site in sites:
        ledger = Ledger(site.ledger_file, site=site.site.name, data=site.data_name)
        if ledger.charges:
            statements[site.site.name] = statement_of(
                ledger, delta=federation.privacy.delta, run=run
            )
    write_json(folder / "privacy.json", statements)
    write_atomic(folder / "privacy.md", statement_markdown(statements).encode())
    return statements
