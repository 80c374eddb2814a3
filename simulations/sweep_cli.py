"""`intramural simulate` with --sweep or --plan: what is shown and written; no work of its own."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from intramural.core.canonical import digest_file, digest_json
from intramural.core.errors import ConfigError, DataError, RoundError
from intramural.core.files import write_atomic, write_json
from intramural.core.package import VERSION
from intramural.core.site import load_site
from intramural.core.threads import processor_count
from intramural.simulations.sites import FOLDERS_MAX
from intramural.simulations.sweep import CELLS, process_starter, run_cells
from intramural.simulations.sweep_cells import Cell, Source, cells_of
from intramural.simulations.sweep_config import load_sweep
from intramural.simulations.sweep_page import headline_of, tables_of

if TYPE_CHECKING:
    from intramural.simulations.planner import Plan
    from intramural.simulations.simulate import Simulation

SWEEP_JSON, SWEEP_HTML = "sweep.json", "sweep.html"
PLAN_JSON, PROBE, PROBED = "plan.json", "probe", "probe.json"
THREADS = 1
"""Threads of a cell unless told: cells side by side use the processors better than threads do, and
a cell's last bits must not depend on how many run at once."""


@dataclass(frozen=True, kw_only=True)
class SweepOrder:
    """What was asked for on the command line."""

    federation: Path
    data: Path
    sweep: Path
    out: Path
    sites: int = 5
    partition: str = "iid"
    workers: int | None = None
    """Cells at once; None: as many as there are processors."""
    threads: int | None = None
    """Threads of a cell; None: 1."""
    resume: bool = False
    options: tuple[str, ...] = ()
    """More options of `simulate` for every cell, such as ("--text", "note")."""


def run_sweep(order: SweepOrder, *, console: Console, as_json: bool = False) -> dict[str, Any]:
    """Run a sweep to its end, write sweep.json and sweep.html, print them, and return sweep.json.

    Raises:
        ConfigError: sweep.toml or a cell is wrong, or the folder holds a sweep already.
        DataError: There are no records.
        RoundError: Every cell failed.
    """
    config, threads = load_sweep(order.sweep), order.threads or THREADS
    if (order.out / CELLS).exists() and not order.resume:
        raise ConfigError(f"{order.out}: holds a sweep already; add --resume, or use another --out")
    if "--ledgers" in order.options:
        raise ConfigError("--ledgers cannot be shared by a sweep's cells; leave it out")
    source = Source(
        sweep=order.sweep,
        federation=order.federation,
        sites=order.sites,
        partition=order.partition,
        salt=_salt(order, threads),
        base_of=lambda name: _base_digest(order, name),
    )
    cells = cells_of(config, source)
    start = process_starter(data=order.data, threads=threads, options=order.options)
    workers = order.workers or processor_count()
    with _Board(console, len(cells)) as board:
        results = run_cells(
            cells, order.out, workers=min(workers, len(cells)), start=start, tell=board.told
        )
    from intramural.simulations.sweep_page import sweep_html
    from intramural.simulations.sweep_report import sweep_report

    report = sweep_report(config, results, folder=order.out)
    write_json(order.out / SWEEP_JSON, report)
    write_atomic(order.out / SWEEP_HTML, sweep_html(report).encode())
    if as_json:
        typer.echo(json.dumps(report))
    else:
        print_sweep(report, console)
        console.print(f"sweep: {order.out / SWEEP_HTML}", highlight=False)
    if all(result.state != "done" for result in results):
        raise RoundError(f"every cell failed, the first: {results[0].reason}")
    return report


def print_sweep(report: dict[str, Any], console: Console) -> None:
    """Print the cells, best first, and what tuning cost."""
    for content in tables_of(report):
        table = Table(title=Text(content["title"]))
        for number, title in enumerate(content["titles"]):
            table.add_column(
                Text(title),
                justify="right" if number else "left",
                overflow="fold",
                no_wrap=number == 0,  # a cell's name is also its folder's
            )
        for row in content["rows"]:
            table.add_row(*map(Text, row["cells"]), style="bold" if row["best"] else "")
        console.print(table)
    for line in (headline_of(report), *report["notes"], (report["privacy"] or {}).get("words")):
        if line:
            console.print(Text(line))


def show_plan(
    simulation: "Simulation",
    *,
    hardware: Path | None,
    console: Console,
    as_json: bool = False,
) -> "Plan":
    """Run a probe of two rounds in OUT/probe, and show what the whole federation would take.

    Args:
        simulation: The whole one; its folder gets plan.json and the probe.
        hardware: hardware.toml; None: every site is like this machine, on links that take no time.
        console: Where to print.
        as_json: Print the plan as one JSON object instead.

    Raises:
        ConfigError, Refused: The plan cannot fit, or costs more than the sites' policy allows.
        IntramuralError: As `simulate`.
    """
    from intramural.models.base import resolve_base
    from intramural.models.footprint import footprint
    from intramural.simulations.hardware import load_hardware, this_machine
    from intramural.simulations.planner import plan_run, plan_words

    if simulation.deal.is_crowd:
        raise ConfigError(f"--plan is for at most {FOLDERS_MAX} sites with folders of their own")
    template, federation = simulation.deal.template, simulation.federation
    machines = load_hardware(hardware) if hardware is not None else this_machine()
    plan = plan_run(
        federation,
        _probe(simulation, console),
        machines,
        need=footprint(
            federation,
            resolve_base(federation.model.base, places=template.model),
            micro_batch=template.compute.micro_batch,
        ),
        policy=template.policy,
    )
    write_json(simulation.folder / PLAN_JSON, plan.to_json())
    if as_json:
        typer.echo(json.dumps(plan.to_json()))
    else:
        _print_plan(plan, console)
        for line in plan_words(plan):
            console.print(Text(line))
    return plan


def _probe(simulation: "Simulation", console: Console) -> dict[str, Any]:
    """Return the probe's report, with its process's most memory; it is run once, and kept."""
    from intramural.models.loading import pick_device
    from intramural.server.screen import Screen
    from intramural.simulations.planner import PROBE_ROUNDS, peak_rss_bytes, probe_of
    from intramural.simulations.simulate import simulate

    deal = replace(simulation.deal, federation=probe_of(simulation.federation))
    folder = simulation.folder / PROBE / digest_json(deal.facts()).removeprefix("sha256:")[:8]
    kept = folder / PROBED
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    run = replace(
        simulation,
        deal=replace(deal, folder=folder),
        resume=True,
        compare=frozenset(),
        engine="inprocess",  # its seconds are those of one site after another
        scenario=None,  # and those of a real clock
        trace=False,
    )
    with Screen(console, rounds=PROBE_ROUNDS) as screen:
        report = simulate(run, watcher=screen)
    if pick_device(simulation.deal.template.compute.device).type == "cpu":
        report["peak_rss_bytes"] = peak_rss_bytes()
    write_json(kept, report)
    return report


def _print_plan(plan: "Plan", console: Console) -> None:
    table = Table(title=Text("the whole federation"))
    for title in ("site", "hours at work", "GB down", "GB up", "GB of memory"):
        table.add_column(title, justify="left" if title == "site" else "right", overflow="fold")
    for site in plan.sites:
        figures = (site.busy_s / 3600, site.down_bytes / 1e9, site.up_bytes / 1e9)
        memory = site.memory_bytes / 1e9
        table.add_row(Text(site.name), *(f"{f:.3f}" for f in figures), f"{memory:.1f}")
    console.print(table)


def _base_digest(order: SweepOrder, name: str) -> str:
    """Return the digest of a base model's content: a cell trained from another is another cell."""
    from intramural.models.base import resolve_base

    places = load_site(order.data).model if order.data.suffix == ".toml" else {}
    return resolve_base(name, places=places).digest


def _salt(order: SweepOrder, threads: int) -> str:
    """Return the digest of what decides a cell's result beside its federation and deal."""
    data = load_site(order.data).data.path if order.data.suffix == ".toml" else order.data
    for file in (order.data, data):
        if not file.is_file():
            raise DataError(f"{file}: no such file; name a file of records, or a site.toml")
    digests = sorted({digest_file(order.data), digest_file(data)})
    return digest_json([digests, list(order.options), threads, VERSION])


class _Board:
    """The live view of a sweep: a bar over its cells, a line for each that ends."""

    def __init__(self, console: Console, cells: int) -> None:
        self._console, self._cells = console, cells
        self._progress = Progress(
            TextColumn("cells"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("cells", total=cells, note="")
        self._running: list[str] = []

    def __enter__(self) -> "_Board":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def told(self, cell: Cell, what: str) -> None:
        """Show what happened to a cell."""
        if what in ("started", "again"):
            self._running = [*(n for n in self._running if n != cell.name), cell.name]
        else:
            self._running = [name for name in self._running if name != cell.name]
            self._progress.advance(self._task)
        self._progress.update(self._task, note=f"running: {', '.join(self._running)}")
        words = {"kept": "finished before", "again": "died; once more from its last round"}
        if what != "started":
            self._console.print(f"cell {cell.name}: {words.get(what, what)}", highlight=False)
