"""`intramural simulate`."""

import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from intramural.core.config import check_config, load_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.site import SiteConfig, load_site
from intramural.core.threads import processor_count
from intramural.server.cli import HOLDOUT_OPTION
from intramural.server.report_table import print_report
from intramural.server.screen import Screen
from intramural.simulations.partition import parse_spec
from intramural.simulations.scenario import load_scenario
from intramural.simulations.sites import Deal, target_column

if TYPE_CHECKING:
    from intramural.simulations.engines import Engine
    from intramural.simulations.simulate import Simulation

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
        str | None,
        typer.Option(
            help="How records are dealt: iid, dirichlet:ALPHA, size:POWER, column:NAME, or "
            "draw:RECORDS, by which each of any number of sites draws so many; by default as the "
            "scenario says, or iid."
        ),
    ] = None,
    scenario: Annotated[
        str | None,
        typer.Option(
            help="Links, speeds, hours and faults of the sites, on a simulated clock: a name "
            "(hospitals-on-vpn, calm ...; docs/scenarios.md) or a .toml file."
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="inprocess; pool (worker processes); batched (many small models in one step); "
            "ray (Flower's own simulation, several machines); or auto, which tries a round and "
            "says what it chose."
        ),
    ] = "inprocess",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of the pool; cells of a sweep at once."),
    ] = None,
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
    holdout: Annotated[Path | None, HOLDOUT_OPTION] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Ranks of the sites' adapters, dealt in turn, such as 4,8,16; each from "
            "exchange.rank_min to exchange.rank."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processor threads of a site; results depend on it in the last bits. By default "
            "1 with pool and auto, and else all.",
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(help="Run a cell for each setting in this sweep.toml, and compare them."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(help="Run two rounds, and tell what the whole federation would take."),
    ] = False,
    hardware: Annotated[
        Path | None,
        typer.Option(help="With --plan: a hardware.toml of the sites' machines and links."),
    ] = None,
    trace: Annotated[
        bool, typer.Option(help="Write OUT/trace.json, to open in ui.perfetto.dev.")
    ] = False,
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
    columns = {"text": text, "label": label, "response": response, "group": group, "person": person}
    console = Console(stderr=as_json)
    if sweep is not None:
        given = {"plan": plan, "scenario": scenario, "ledgers": ledgers, "ranks": ranks}
        given |= {"holdout": holdout, "trace": trace, "hardware": hardware}
        _refuse_with_sweep(engine, **given)
        order: dict[str, Any] = {"federation": federation, "data": data, "sweep": sweep, "out": out}
        order |= {"sites": sites, "partition": partition or "iid", "options": _options(columns)}
        order |= {"workers": workers, "threads": threads, "resume": resume}
        _sweep(console, as_json=as_json, **order)
        return
    from intramural.simulations.simulate import Simulation

    config = load_config(federation, FederationConfig)
    each = threads or (1 if engine in ("auto", "pool") else None)
    template = _template(data, columns, _beside(federation, config.model.base), threads=each)
    target_column(config, template)
    played = load_scenario(scenario) if scenario is not None else None
    partition = _parsed(partition or (played.partition if played else None) or "iid")
    simulation = Simulation(
        deal=Deal(
            federation=config,
            template=template,
            sites=sites,
            partition=partition,
            folder=out,
            ledgers=ledgers,
            ranks=_ranks(ranks),
        ),
        engine=_engine(engine),
        resume=resume,
        compare=_comparisons(compare),
        scenario=played,
        holdout=holdout,
        workers=workers,
        trace=trace,
    )
    if plan:
        from intramural.simulations.sweep_cli import show_plan

        show_plan(simulation, hardware=hardware, console=console, as_json=as_json)
    else:
        _run(simulation, console, as_json=as_json)


def _run(simulation: "Simulation", console: Console, *, as_json: bool) -> None:
    from intramural.simulations.simulate import simulate

    with Screen(console, rounds=simulation.federation.federation.rounds) as screen:
        report = simulate(simulation, watcher=screen)
    if as_json:
        typer.echo(json.dumps(report))
        return
    print_report(report, console)
    out = simulation.folder
    console.print(f"report: {out / 'report.html'}   model: {out / 'model'}", highlight=False)


def _parsed(partition: str) -> str:
    parse_spec(partition)  # refuses what it cannot read, before anything is written
    return partition


def _ranks(text: str | None) -> tuple[int, ...]:
    numbers = [] if text is None else text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ConfigError(f"--ranks: {text!r} is no list of whole numbers such as 4,8,16")
    return tuple(int(number) for number in numbers)


def _beside(federation: Path, base: str) -> dict[str, str]:
    """Return the whole path of a base model beside federation.toml, if it lies there."""
    folder = federation.parent / base
    return {base: str(folder.resolve())} if folder.is_dir() else {}


def _refuse_with_sweep(engine: str, **given: Any) -> None:
    given |= {"engine": engine != "inprocess"}
    named = [f"--{name}" for name, value in given.items() if value]
    if named:
        raise ConfigError(f"a sweep's cells take no {', '.join(named)}; leave it out")


def _sweep(console: Console, *, as_json: bool, **order: Any) -> None:
    from intramural.simulations.sweep_cli import SweepOrder, run_sweep

    run_sweep(SweepOrder(**order), console=console, as_json=as_json)


def _options(columns: dict[str, str | None]) -> tuple[str, ...]:
    """Return the columns that were named, as options of another `simulate`."""
    named = [[f"--{name}", column] for name, column in columns.items() if column is not None]
    return tuple(chain.from_iterable(named))


def _engine(name: str) -> "Engine":
    from intramural.simulations.engines import ENGINES

    if name not in ENGINES:
        raise ConfigError(f"--engine is one of {', '.join(ENGINES)}; got {name}")
    return cast("Engine", name)


def _comparisons(names: str) -> frozenset[str]:
    from intramural.simulations.simulate import COMPARISONS

    kinds = frozenset(names.split(",")) - {"none"}
    if not kinds <= COMPARISONS:
        raise ConfigError(f"--compare is none or some of {','.join(sorted(COMPARISONS))}")
    return kinds


def _template(
    data: Path,
    columns: dict[str, str | None],
    places: dict[str, str],
    *,
    threads: int | None,
) -> SiteConfig:
    """Return what all simulated sites share, from a site.toml or from a file's columns.

    A base model beside federation.toml is in `places`, by its whole path: sites run elsewhere.
    """
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
    threads = threads or template.compute.threads or processor_count()
    compute = template.compute.model_copy(update={"threads": threads})
    model = template.model | places
    return template.model_copy(update={"compute": compute, "model": model})
