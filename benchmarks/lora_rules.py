"""Which rule for LoRA? Accuracy, aggregation error, bytes and time of each, over seeds.

Sites share the 11,982 ICD-10-CM titles of examples/icd10 (test split grouped by category); MiniLM
with LoRA of rank 8 on query and value, pooler and classifier trained whole; 20 rounds of 4 steps of
16 titles (with privacy: of 64 expected). AdamW at 8e-3 without privacy, SGD at 2.0 with momentum
0.9 with it: the settings of the examples for plain averaging, not tuned for any rule. A cell takes
about a minute on one processor, and there are 112: two hours on two.

What is in the JSON file already is not run again; Ctrl-C loses the cells that are under way.

    python -m benchmarks.lora_rules --json FILE.json [--workers 2] [--only core] [--seeds 7]
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.harness import machine_facts
from intramural.core.config import check_config, read_table
from intramural.core.errors import IntramuralError
from intramural.core.federation import FederationConfig
from intramural.core.files import write_json
from intramural.core.site import load_site
from intramural.server.watcher import Watcher
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal

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
SEEDS = (7, 8, 9)
MIXED = (4, 8, 16)
ROUNDS, STEPS = 20, 4


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One federation."""

    part: str
    """'core', 'sites' or 'ranks'."""
    rule: str
    partition: str
    epsilon: float | None
    sites: int = 10
    ranks: tuple[int, ...] = ()
    seed: int

    @property
    def setting(self) -> tuple[Any, ...]:
        """Return what cells of different rules and seeds share."""
        return (self.part, self.partition, self.epsilon, self.sites, self.ranks)


def cells() -> Iterator[Cell]:
    """Yield the cells: a whole table for one seed, then the next seed."""
    splits = ("iid", "dirichlet:0.1")
    for seed in SEEDS:
        for epsilon, partition, rule in itertools.product((None, 8.0), splits, RULES):
            if rule != "fedsa-lora" or epsilon is None:
                yield Cell(part="core", rule=rule, partition=partition, epsilon=epsilon, seed=seed)
    for seed in SEEDS:
        for rule in ("flora", "flexlora"):
            yield Cell(
                part="ranks", rule=rule, partition=splits[1], epsilon=None, ranks=MIXED, seed=seed
            )
    for sites, rule in itertools.product((3, 30), RULES):
        yield Cell(
            part="sites", rule=rule, partition=splits[0], epsilon=None, sites=sites, seed=SEEDS[0]
        )


def federation_of(cell: Cell, *, rounds: int = ROUNDS) -> FederationConfig:
    """Return a cell's federation: the example's, with what the cell changes."""
    table = read_table(HERE / "federation.toml")
    table["federation"] |= {"rounds": rounds, "seed": cell.seed}
    table["model"]["max_length"] = 32
    table["training"]["local_steps"] = STEPS
    table["strategy"] = {"rule": cell.rule}
    table["sites"] = {"min": cell.sites}
    table["evaluation"] = {"every": rounds}
    if cell.ranks:
        table["exchange"] |= {"rank": max(cell.ranks), "rank_min": min(cell.ranks)}
        table["exchange"]["alpha"] = 2 * max(cell.ranks)  # the scale is that of all other cells
    if cell.epsilon is not None:
        table["training"] |= {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 2.0}
        table["training"]["batch_size"] = 64
        table["strategy"]["weights"] = "equal"
        nominal = 6500 // cell.sites
        table["privacy"] = {"unit": "record", "epsilon": cell.epsilon, "delta": 1e-5}
        table["privacy"] |= {"clip_norm": 1.0, "nominal_records": nominal}
    return check_config(table, FederationConfig, source="benchmark")


def run(cell: Cell, *, rounds: int = ROUNDS) -> dict[str, Any]:
    """Run one cell, and return its figures, or why it was refused."""
    template = load_site(HERE / "site.toml")
    compute = template.compute.model_copy(update={"threads": 1, "device": "cpu"})
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            deal = Deal(
                federation=federation_of(cell, rounds=rounds),
                template=template.model_copy(update={"compute": compute}),
                sites=cell.sites,
                partition=cell.partition,
                folder=Path(folder) / "run",
                ranks=cell.ranks,
            )
            plan = Simulation(deal=deal, engine="inprocess", compare=frozenset())
            report = simulate(plan, watcher=Watcher())
        except IntramuralError as error:
            return {"refused": str(error)}
    errors = [e for r in report["rounds"] if (e := r.get("aggregation_error")) is not None]
    told = list((report["privacy"] or {}).values())
    return {
        "accuracy": report["final"]["federated"]["accuracy"],
        "macro_f1": report["final"]["federated"]["macro_f1"],
        "error_median": statistics.median(errors) if errors else None,
        "error_max": max(errors) if errors else None,
        "bytes_up": sum(r["bytes_up"] for r in report["rounds"]),
        "bytes_down": sum(r["bytes_down"] for r in report["rounds"]),
        "epsilon": max(site["epsilon"] for site in told) if told else None,
        "seconds": round(time.perf_counter() - began, 1),
    }


def run_all(todo: Sequence[Cell], found: dict[str, Any], options: argparse.Namespace) -> None:
    """Run the cells on several processes, and write the file after each."""
    rounds = 2 if options.quick else ROUNDS
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        Progress() as progress,
        ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool,
    ):
        bar = progress.add_task("cells", total=len(todo))
        under_way = {pool.submit(run, cell, rounds=rounds): cell for cell in todo}
        try:
            for done in as_completed(under_way):
                found["rows"].append({"cell": key_of(under_way[done])} | done.result())
                write_json(options.json, found)
                progress.advance(bar)
        except KeyboardInterrupt:
            for future in under_way:
                future.cancel()
            raise


def key_of(cell: Cell) -> dict[str, Any]:
    """Return the cell as the file has it."""
    return asdict(cell) | {"ranks": list(cell.ranks)}


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the results, one line for each rule in each setting, in the order of the cells."""
    table = Table(title="LoRA rules on ICD-10-CM titles: test accuracy, mean and sd over seeds")
    for name in ("sites", "split", "epsilon", "rule", "accuracy", "sd", "macro-F1", "seeds"):
        table.add_column(name)
    for name in ("aggregation error", "MB up", "MB down", "s"):
        table.add_column(name)
    by_cell = {json.dumps(row["cell"], sort_keys=True): row for row in rows}
    seen = []
    for cell in cells():
        if (cell.setting, cell.rule) in seen:
            continue
        seen.append((cell.setting, cell.rule))
        keys = [json.dumps(key_of(replace(cell, seed=seed)), sort_keys=True) for seed in SEEDS]
        same = [by_cell[key] for key in keys if key in by_cell]
        if same:
            table.add_row(*_figures(cell, same))
    return table


def _figures(cell: Cell, rows: Sequence[dict[str, Any]]) -> list[str]:
    ranks = f", ranks {'/'.join(map(str, cell.ranks))}" if cell.ranks else ""
    epsilon = "none" if cell.epsilon is None else f"{cell.epsilon:g}"
    head = [f"{cell.sites}{ranks}", cell.partition, epsilon, cell.rule]
    if "refused" in rows[0]:
        return [*head, "refused", "", "", str(len(rows)), "", "", "", ""]

    def mean(name: str, scale: float = 1.0) -> float:
        return statistics.fmean(row[name] for row in rows) / scale

    accuracy = [row["accuracy"] for row in rows]
    spread = f"{statistics.stdev(accuracy):.3f}" if len(accuracy) > 1 else ""
    errors = [row["error_median"] for row in rows if row["error_median"] is not None]
    error = f"{statistics.median(errors):.0e}" if errors else "personal B"
    return [
        *head,
        f"{mean('accuracy'):.3f}",
        spread,
        f"{mean('macro_f1'):.3f}",
        str(len(rows)),
        error,
        f"{mean('bytes_up', 1e6):.0f}",
        f"{mean('bytes_down', 1e6):.0f}",
        f"{mean('seconds'):.0f}",
    ]


def main() -> None:
    """Run what is not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.lora_rules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="results, read and added to")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cells at a time")
    parser.add_argument("--only", nargs="+", help="parts to run: core, ranks, sites")
    parser.add_argument("--seeds", nargs="+", type=int, help="of which seeds")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it run at all?")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.is_file() else {"rows": []}
    if not options.table:
        found["machine"] = machine_facts()
        done = [row["cell"] for row in found["rows"]]
        todo = [
            cell
            for cell in cells()
            if key_of(cell) not in done
            and cell.part in (options.only or ("core", "ranks", "sites"))
            and cell.seed in (options.seeds or SEEDS)
        ]
        with contextlib.suppress(KeyboardInterrupt):
            run_all(todo, found, options)
    Console(width=150).print(table_of(found["rows"]))


if __name__ == "__main__":
    main()
