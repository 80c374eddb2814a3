"""`intramural simulate`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from intramural.core.config import check_config, load_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.site import SiteConfig, load_site
from intramural.server.report_table import print_report
from intramural.server.screen import Screen
from intramural.simulations.partition import parse_spec
from intramural.simulations.sites import Deal, target_column

FEDERATION = typer.Argument(help="The federation's configuration, federation.toml.")
DATA = typer.Option(
    help="A site.toml whose records are dealt out, with its models, policy and machine; or a .csv, "
    ".jsonl or .parquet file, whose columns --text, --label ... name."
)


def simulate_command(
    federation: Annotated[Path, FEDERATION],
    data: Annotated[Path, DATA],
    out: Annotated[
        Path, typer.Option(help="Folder to write to: report, model, journal, checkpoints, sites.")
    ],
    sites: Annotated[
        int, typer.Option(min=1, help="Number of sites the records are dealt to.")
    ] = 5,
    partition: Annotated[
        str,
        typer.Option(
            help="How records are dealt: iid, dirichlet:ALPHA, size:POWER or column:NAME."
        ),
    ] = "iid",
    engine: Annotated[
        str, typer.Option(help="inprocess, or ray (Flower's own simulation, several processes).")
    ] = "inprocess",
    compare: Annotated[
        str, typer.Option(help="What to compare with: local,pooled,baseline, or none.")
    ] = "local,pooled,baseline",
    text: Annotated[str | None, typer.Option(help="Column of the text.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label (classification).")] = None,
    response: Annotated[
        str | None, typer.Option(help="Column of the response (generation).")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Column whose equal values stay on one side of a split.")
    ] = None,
    person: Annotated[
        str | None, typer.Option(help="Column of the person a record is about.")
    ] = None,
    ledgers: Annotated[
        Path | None,
        typer.Option(help="Folder of the sites' privacy ledgers: runs that share it add up."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Processor threads; results depend on it in the last bits."),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last committed round in OUT.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.")
    ] = False,
) -> None:
    """Simulate a federation on this machine; only the transport differs from a real one.

    FEDERATION is a federation.toml. The records are dealt to sites and the
    rounds run; then the same model is trained alone at each site and on all
    records together. Look at OUT/report.html and OUT/model afterwards.

    Example: intramural simulate federation.toml --data notes.csv --text note
    --label chapter --sites 5 --partition dirichlet:0.3 --out runs/first
    """
    from intramural.simulations.simulate import COMPARISONS, Simulation, simulate

    columns = {"text": text, "label": label, "response": response, "group": group, "person": person}
    config = load_config(federation, FederationConfig)
    template = _template(data, columns, threads=threads)
    beside = federation.parent / config.model.base
    if beside.is_dir():  # sites run elsewhere: tell them the whole path
        places = template.model | {config.model.base: str(beside.resolve())}
        template = template.model_copy(update={"model": places})
    target_column(config, template)
    parse_spec(partition)
    kinds = frozenset(compare.split(",")) - {"none"}
    if engine not in ("inprocess", "ray") or not kinds <= COMPARISONS:
        raise ConfigError(
            "--engine is inprocess or ray; --compare is none or some of "
            f"{','.join(sorted(COMPARISONS))}; got --engine {engine} --compare {compare}"
        )
    plan = Simulation(
        deal=Deal(
            federation=config,
            template=template,
            sites=sites,
            partition=partition,
            folder=out,
            ledgers=ledgers,
        ),
        engine="ray" if engine == "ray" else "inprocess",
        resume=resume,
        compare=kinds,
    )
    console = Console(stderr=as_json)
    with Screen(console, rounds=config.federation.rounds) as screen:
        report = simulate(plan, watcher=screen)
    if as_json:
        typer.echo(json.dumps(report))
        return
    print_report(report, console)
    console.print(f"report: {out / 'report.html'}   model: {out / 'model'}", highlight=False)


def _template(data: Path, columns: dict[str, str | None], *, threads: int | None) -> SiteConfig:
    """Return what all simulated sites share, from a site.toml or from a file's columns."""
    named = {name: column for name, column in columns.items() if column is not None}
    if data.suffix == ".toml":
        if named:
            raise ConfigError(f"{data} names the columns itself; leave out --{', --'.join(named)}")
        template = load_site(data)
    else:
        columns_of_file = {"text": "text", "label": "label", "response": "response", **named}
        table = {
            "site": {"name": "simulated"},
            "data": {"path": str(data.resolve()), **columns_of_file},
            "policy": {"require_privacy": False, "exchange": ["lora", "full", "head"]},
        }
        template = check_config(table, SiteConfig, source="options")
    # fixed here, so that every engine adds up in the same order
    threads = threads or template.compute.threads or os.cpu_count()
    compute = template.compute.model_copy(update={"threads": threads})
    return template.model_copy(update={"compute": compute})
