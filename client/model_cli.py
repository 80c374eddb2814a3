"""`intramural client model`: a site's own model of a federation, as files."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from intramural.client.approve_cli import approvals_of
from intramural.client.keeping import has_own_model
from intramural.client.policy_cli import read_manifest
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.site import SiteConfig, load_site


def model_command(
    federation: Annotated[
        str,
        typer.Argument(
            help="Name of a federation whose manifest is approved here, or a federation.toml, "
            "manifest or envelope."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the model to; a new one.")],
    site: Annotated[Path, typer.Option(help="The site's site.toml.")] = Path("site.toml"),
    run: Annotated[
        str | None, typer.Option(help="The run's id, of several of one manifest; else the last.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the site's own model, for transformers and PEFT to load.

    Where a federation leaves a part of the model at each site (exchange.personal,
    'fedsa-lora') or has each site train one of its own ([personal]), this is that
    model, once the run's last test has brought the final arrays. Nothing leaves
    the site. The model was trained on the site's records without noise, unless
    the federation has [privacy]: keep it as you keep them.

    Example: intramural client model icd-chapters --site site.toml --out own-model
    """
    config = load_site(site)
    manifest = _manifest(federation, site, config)
    if not has_own_model(manifest):
        raise ConfigError(
            f"{federation}: its sites have no model of their own: there is neither [personal] nor "
            "exchange.personal, and the rule is not 'fedsa-lora'; take the coordinator's model"
        )
    if out.exists():
        raise ConfigError(f"{out}: is there already; name a new folder with --out")
    told = _write(config, manifest, out, run=run)
    typer.echo(json.dumps(told) if as_json else f"{out}: the model of {told['site']}")


def _manifest(named: str, site_file: Path, site: SiteConfig) -> FederationConfig:
    if Path(named).is_file():
        return read_manifest(Path(named))
    return approvals_of(site_file, site).find(named, statuses=("approved",)).federation


def _write(
    site: SiteConfig, federation: FederationConfig, out: Path, *, run: str | None
) -> dict[str, Any]:
    """Write the model, and return what was written, as a JSON value."""
    from intramural.client.agent import SiteAgent  # here: torch takes seconds to load
    from intramural.models.resident import save_model

    agent = SiteAgent(site, federation)
    run = agent.keeping.write_own_model(agent.resident(), run)
    save_model(agent.resident(), out, own=True)
    return {"site": agent.name, "manifest": federation.digest, "run": run, "model": str(out)}
