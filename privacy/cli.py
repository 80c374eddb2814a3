"""`intramural privacy plan`."""

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from intramural.core.config import load_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.files import write_atomic
from intramural.privacy.told import told

if TYPE_CHECKING:  # dp-accounting takes seconds to load, and other commands need none
    from intramural.privacy.accountant import Relation

POINTS_MAX = 40
"""Rounds at which a curve is computed; more would not be seen."""

privacy_app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@privacy_app.callback()
def privacy() -> None:
    """Plan differential privacy before anybody trains.

    Example: intramural privacy plan --federation federation.toml
    """  # this callback keeps `plan` a command of its own


@privacy_app.command("plan")
def plan_command(
    federation: Annotated[
        Path | None, typer.Option(help="A federation.toml that claims privacy.")
    ] = None,
    nominal_records: Annotated[
        int | None, typer.Option(help="Public number of records a site is taken to hold.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Expected records a step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps a site makes each round.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    delta: Annotated[
        float | None, typer.Option(help="Delta; below 1 / nominal records, better a tenth of it.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy to spend in all: the noise is computed.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Noise multiplier: epsilon is computed.")
    ] = None,
    relation: Annotated[
        str, typer.Option(help="Neighbouring data sets: add-remove or replace-one.")
    ] = "add-remove",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write epsilon over rounds to this SVG file.")
    ] = None,
) -> None:
    """Show what a federation costs in privacy before it runs; impossible plans are refused.

    Give --federation, or all of --nominal-records, --batch, --steps, --rounds
    and --delta with one of --epsilon and --noise. Epsilon is that of PLD; PRV
    (Opacus) checks it, RDP bounds it.

    Example: intramural privacy plan --nominal-records 8000 --batch 80 --steps
    20 --rounds 20 --delta 1e-5 --epsilon 3
    """
    from intramural.privacy.plan import PrivacyPlan

    named: dict[str, Any] = {
        "nominal-records": nominal_records,
        "batch": batch,
        "steps": steps,
        "rounds": rounds,
        "delta": delta,
    }
    choice = {"epsilon": epsilon, "noise": noise}
    if federation is not None:
        given = [name for name, value in (named | choice).items() if value is not None]
        if given or relation != "add-remove":
            names = ", ".join(f"--{name}" for name in given or ["relation"])
            raise ConfigError(f"--federation says all of it; leave out {names}")
        plan = PrivacyPlan.of(load_config(federation, FederationConfig))
    else:
        plan = _plan_of(named, epsilon=epsilon, noise=noise, relation=relation)
    found = _costs(plan)
    if plot is not None:
        try:
            write_atomic(plot, _curve_svg(plan).encode())
        except OSError as error:
            raise ConfigError(f"--plot {plot}: {error.strerror}; name a file to write") from None
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    console.print(_table(found))
    for warning in found["warnings"]:
        console.print(Text(f"warning: {warning}"))


def _plan_of(
    named: dict[str, Any], *, epsilon: float | None, noise: float | None, relation: str
) -> Any:
    """Return a plan from the options.

    Raises:
        ConfigError: Options are missing, too many, or out of range.
    """
    from intramural.privacy.calibration import calibrate
    from intramural.privacy.plan import PrivacyPlan

    missing = [f"--{name}" for name, value in named.items() if value is None]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}; or give --federation")
    if (epsilon is None) == (noise is None):
        raise ConfigError("give exactly one of --epsilon and --noise")
    if relation not in ("add-remove", "replace-one"):
        raise ConfigError(f"--relation is add-remove or replace-one, got {relation!r}")
    counts = [name for name in ("nominal-records", "batch", "steps", "rounds") if named[name] < 1]
    if counts:
        raise ConfigError(f"must be at least 1: {', '.join(f'--{name}' for name in counts)}")
    known = cast("Relation", relation)
    batch, nominal, delta = named["batch"], named["nominal-records"], named["delta"]
    if batch > nominal:
        raise ConfigError(
            f"--batch {batch} is above --nominal-records {nominal}: the sample rate would be "
            "above 1; lower the batch"
        )
    if not 0 < delta < 1 / nominal:
        raise ConfigError(f"--delta must be above 0 and below 1 / {nominal}, got {delta:g}")
    if noise is None:
        noise = calibrate(
            epsilon=epsilon or 0.0,
            delta=delta,
            sample_rate=batch / nominal,
            steps=named["steps"] * named["rounds"],
            relation=known,
        )
    plan = PrivacyPlan(
        unit="record",
        relation=known,
        sample_rate=batch / nominal,
        noise_multiplier=noise,
        clip_norm=1.0,  # changes no cost: noise is told in multiples of it
        divisor=float(batch),
        steps=named["steps"],
        rounds=named["rounds"],
        delta=delta,
    )
    plan.event()  # refuses a noise that is none
    return plan


def _costs(plan: Any) -> dict[str, Any]:
    """Return the plan and its cost by each accountant, as a JSON value."""
    from intramural.privacy.accountant import answered_by, cross_check
    from intramural.privacy.plan import SAMPLER, evaluations

    cost = plan.cost()
    checks = cross_check(plan.total(), delta=plan.delta, relation=plan.relation)
    return {
        "unit": plan.unit,
        "relation": plan.relation,
        "delta": plan.delta,
        "sampler": SAMPLER,
        "sample_rate": plan.sample_rate,
        "noise_multiplier": plan.noise_multiplier,
        "nominal_units": plan.nominal_units,
        "divisor": plan.divisor,
        "steps": plan.steps,
        "rounds": plan.rounds,
        "records_per_person": plan.records_per_person,
        "metrics_noise": plan.metrics_noise,
        "evaluations": evaluations(plan.rounds, plan.evaluate_every, plan.rounds)
        if plan.metrics_noise
        else 0,
        "epsilon": {"pld": cost if math.isfinite(cost) else None} | checks,
        "accountant": answered_by(plan.total(), delta=plan.delta),
        "warnings": plan.warnings(),
    }


def _table(found: dict[str, Any]) -> Table:
    """Return the plan for people; epsilon stands among all that gives it a meaning."""
    unit, costs = found["unit"], found["epsilon"]
    changed = "added or removed" if found["relation"] == "add-remove" else "replaced"
    rows = [
        ("protects", f"one {unit} {changed} ({found['relation']})"),
        ("sampler", f"{found['sampler']}, each {unit} at rate {found['sample_rate']:g} a step"),
        ("nominal", f"{found['nominal_units']} {unit}s a site, {found['divisor']:g} a step"),
        ("steps", f"{found['steps']} a round, {found['rounds']} rounds"),
        ("noise multiplier", f"{found['noise_multiplier']:g}"),
        ("delta", f"{found['delta']:g}"),
        ("epsilon, PLD", f"{_told(costs['pld'])}  ({found['accountant']})"),
        ("epsilon, PRV", f"{_told(costs['prv'])}  (Opacus, a check)"),
        ("epsilon, RDP", f"{_told(costs['rdp'])}  (an upper bound)"),
    ]
    if found["metrics_noise"]:
        line = f"{found['evaluations']} in epsilon, noise multiplier {found['metrics_noise']:g}"
        rows.insert(5, ("evaluations", line))
    table = Table(title="Privacy plan of one site", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        bold = "bold" if name == "epsilon, PLD" else ""
        table.add_row(Text(name), Text(value), style=bold)
    return table


def _told(epsilon: float | None) -> str:
    return "no answer" if epsilon is None else told(epsilon)


def _curve_svg(plan: Any) -> str:
    """Return epsilon over rounds as an SVG file; the same plan gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from intramural.privacy.accountant import SCREEN_INTERVAL, epsilon_rdp
    from intramural.privacy.plan import SAMPLER

    count = min(plan.rounds, POINTS_MAX)
    at = sorted({round(plan.rounds * i / count) for i in range(1, count + 1)})
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "intramural"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        exact = [plan.cost(done, interval=SCREEN_INTERVAL) for done in at]
        axes.plot(at, exact, color="#0072B2", marker="o", markersize=3, label="PLD")
        if plan.relation == "add-remove":
            bound = [epsilon_rdp(plan.total(done), delta=plan.delta) for done in at]
            axes.plot(at, bound, color="#D55E00", linestyle="--", label="RDP, an upper bound")
        axes.set(
            xlabel="rounds",
            ylabel=f"epsilon at delta = {plan.delta:g}",
            title=f"one {plan.unit}, {plan.relation}, {SAMPLER} sampling at {plan.sample_rate:g},"
            f" noise multiplier {plan.noise_multiplier:g}",
            xlim=(0, None),
            ylim=(0, None),
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
