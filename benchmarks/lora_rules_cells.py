"""Cells of benchmarks/lora_rules.py: the federations that are compared, and how one is run."""

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intramural.core.config import check_config, read_table
from intramural.core.errors import ConfigError, Refused
from intramural.core.federation import FederationConfig
from intramural.core.site import load_site
from intramural.server.watcher import Watcher
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from intramural.simulations.sweep_report import validation_of

HERE = Path(__file__).parent.parent / "examples" / "icd10"
RULES = (
    "fedavg",
    "ffa-lora",
    "rolora",
    "fedsvd",
    "fedex-lora",
    "flora",
    "flexlora",
    "fedsa-lora",
)
IID, SKEWED = "iid", "dirichlet:0.1"
SEEDS = (7, 8, 9)
MIXED = (4, 8, 16)
ROUNDS, STEPS = 12, 4
PRIVATE_ROUNDS, PRIVATE_RATE = 6, 5.0
PRIVATE_TRAINING = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "learning_rate": PRIVATE_RATE,
    "batch_size": 128,
    "local_steps": 2,
}
TITLES = 6500
"""About how many the sites train on together: a public constant."""
PARTS = ("core", "ranks", "sites")
RATE = 8e-3
"""AdamW's, of examples/icd10/federation.toml: every cell without privacy that names no other."""
RATES = (RATE / 3, RATE, RATE * 3)
"""What the search tries, for every rule alike."""
SEARCH, SEARCH_ROUNDS = "search", 10


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One federation."""

    part: str
    """'core', 'sites', 'ranks' or 'search'."""
    rule: str
    partition: str
    epsilon: float | None
    sites: int = 10
    ranks: tuple[int, ...] = ()
    seed: int
    rate: float | None = None
    """AdamW's learning rate; None: `RATE`."""

    @property
    def setting(self) -> tuple[Any, ...]:
        """Return what cells of different rules and seeds share."""
        return (self.part, self.partition, self.epsilon, self.sites, self.ranks)

    @property
    def key(self) -> dict[str, Any]:
        """Return the cell as the file has it; it does not name a rate that is `RATE`."""
        key = asdict(self) | {"ranks": list(self.ranks)}
        if key["rate"] in (None, RATE):
            del key["rate"]
        return key


def cells(rates: Mapping[str, float]) -> Iterator[Cell]:
    """Yield the cells: a whole table for one seed, then the next seed.

    Args:
        rates: Learning rates without privacy, by rule; `RATE` for one that is not named.
    """
    for seed in SEEDS:
        for epsilon, partition, rule in itertools.product((None, 8.0), (IID, SKEWED), RULES):
            rate = rates.get(rule) if epsilon is None else None
            yield Cell(
                part="core", rule=rule, partition=partition, epsilon=epsilon, seed=seed, rate=rate
            )
    for seed, rule in itertools.product(SEEDS, ("flora", "flexlora")):
        yield Cell(
            part="ranks",
            rule=rule,
            partition=SKEWED,
            epsilon=None,
            ranks=MIXED,
            seed=seed,
            rate=rates.get(rule),
        )
    for sites, rule in itertools.product((3, 30), RULES):
        yield Cell(
            part="sites",
            rule=rule,
            partition=IID,
            epsilon=None,
            sites=sites,
            seed=SEEDS[0],
            rate=rates.get(rule),
        )


def search_cells() -> Iterator[Cell]:
    """Yield the search's cells: each rule with the same rates, one seed, iid, without privacy."""
    for rate, rule in itertools.product(RATES, RULES):
        yield Cell(part=SEARCH, rule=rule, partition=IID, epsilon=None, seed=SEEDS[0], rate=rate)


def federation_of(cell: Cell, *, rounds: int = ROUNDS) -> FederationConfig:
    """Return a cell's federation: the example's, with what the cell changes."""
    table = read_table(HERE / "federation.toml")
    table["federation"] |= {"rounds": rounds, "seed": cell.seed}
    table["model"]["max_length"] = 32
    table["training"] |= {"local_steps": STEPS, "learning_rate": cell.rate or RATE}
    table["strategy"] = {"rule": cell.rule}
    table["sites"] = {"min": cell.sites}
    table["evaluation"] = {"every": rounds}
    if cell.ranks:
        table["exchange"] |= {"rank": max(cell.ranks), "rank_min": min(cell.ranks)}
        table["exchange"]["alpha"] = 2 * max(cell.ranks)  # the scale is that of all other cells
    if cell.epsilon is not None:
        table["federation"]["rounds"] = table["evaluation"]["every"] = min(rounds, PRIVATE_ROUNDS)
        table["model"]["pooler"] = "identity"  # noise costs least where little is trained
        table["exchange"]["trained_modules"] = ["classifier"]
        table["training"] |= PRIVATE_TRAINING
        table["strategy"]["weights"] = "equal"
        table["privacy"] = {"unit": "record", "epsilon": cell.epsilon, "delta": 1e-5}
        table["privacy"] |= {"clip_norm": 1.0, "nominal_records": TITLES // cell.sites}
    return check_config(table, FederationConfig, source="benchmark")


def run(cell: Cell, *, rounds: int, folder: Path) -> dict[str, Any]:
    """Run one cell in a new folder, and return its figures, or why it was refused.

    Raises:
        IntramuralError: As `simulate`, but for what is refused before the first round.
    """
    template = load_site(HERE / "site.toml")
    compute = template.compute.model_copy(update={"threads": 1, "device": "cpu"})
    began, worked = time.perf_counter(), time.process_time()
    try:
        deal = Deal(
            federation=federation_of(cell, rounds=rounds),
            template=template.model_copy(update={"compute": compute}),
            sites=cell.sites,
            partition=cell.partition,
            folder=folder,
            ranks=cell.ranks,
        )
        plan = Simulation(deal=deal, engine="inprocess", compare=frozenset())
        report = simulate(plan, watcher=Watcher())
    except (ConfigError, Refused) as error:
        return {"refused": str(error)}
    return figures_of(report, test=cell.part != SEARCH) | {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
    }


def figures_of(report: Mapping[str, Any], *, test: bool) -> dict[str, Any]:
    """Return what the table needs of a report; what chooses by it must not see the test split."""
    rounds, final = report["rounds"], report["final"]["federated"]
    errors = [e for r in rounds if (e := r.get("aggregation_error")) is not None]
    told = list((report["privacy"] or {}).values())
    labels: Counter[str] = Counter()
    for site in report["sites"]:
        labels.update(site["labels"])
    return {
        **({name: final[name] for name in ("accuracy", "macro_f1")} if test else {}),
        "validation_accuracy": validation_of(report, "accuracy"),
        "commonest": max(labels.values()) / labels.total() if labels else None,
        "error_median": statistics.median(errors) if errors else None,
        "error_max": max(errors) if errors else None,
        "bytes_up": sum(r["bytes_up"] for r in rounds),
        "bytes_down": sum(r["bytes_down"] for r in rounds),
        "epsilon": max(site["epsilon"] for site in told) if told else None,
    }
