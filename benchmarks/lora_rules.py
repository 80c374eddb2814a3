"""Which rule for LoRA? Accuracy, aggregation error, bytes and time of each, over seeds.

Sites share the 11,982 ICD-10-CM titles of examples/icd10 (test split grouped by category); MiniLM
with LoRA of rank 8 on query and value.

- Without privacy: pooler and classifier trained whole beside the adapter; 12 rounds of 4 steps of
  16 titles, AdamW at 8e-3.
- With privacy (a record, epsilon 8): the classifier alone beside the adapter, 6 rounds of 2 steps
  of 128 titles expected, clipped to 1, SGD at 5.0 with momentum 0.9.

Both were chosen for plain averaging in a few trials, and for no other rule.

`--search` tries three AdamW rates for every rule (8e-3, a third and three times of it; 10 rounds,
iid, no privacy, one seed) and prints validation accuracies; `--tuned` then runs the cells without
privacy at each rule's best.

There are 118 cells, which take two hours and a half of two cores: one takes about a minute and a
half of one processor without privacy (30 sites: three times that) and three with it.

What is in the JSON file already is not run again; Ctrl-C loses the cells that are under way, and so
does a failing cell, which the next start tries again.

    python -m benchmarks.lora_rules --json FILE.json [--workers 2] [--only core] [--seeds 7]
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks.harness import machine_facts
from benchmarks.lora_rules_cells import (
    PARTS,
    ROUNDS,
    SEARCH_ROUNDS,
    SEEDS,
    SKEWED,
    Cell,
    cells,
    run,
    search_cells,
)
from benchmarks.lora_rules_table import found_of, notes_of, rates_of, search_table, table_of
from intramural.core.files import write_json

QUICK_ROUNDS = 2
INTERRUPTED = 130


def run_all(todo: Sequence[Cell], found: dict[str, Any], options: argparse.Namespace) -> int:
    """Run the cells on several processes, write the file after each, and count those that failed.

    Raises:
        BrokenProcessPool: A process was killed, mostly for want of memory.
    """
    failed = 0
    rounds = SEARCH_ROUNDS if options.search else ROUNDS
    rounds = QUICK_ROUNDS if options.quick else rounds
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")) as progress,
        _processes(options.workers) as pool,
    ):
        bar, began = progress.add_task("cells", total=len(todo)), time.monotonic()
        under_way = {pool.submit(_run, cell, rounds, folder): cell for cell in todo}
        for count, done in enumerate(as_completed(under_way), start=1):
            error = done.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            if error is not None:  # whatever it was, the other cells are worth having
                failed += 1
                words = f"failed: {under_way[done]}: {type(error).__name__}: {error}"
                progress.console.print(words)
            else:
                found["rows"].append({"cell": under_way[done].key} | done.result())
                write_json(options.json, found)
            left_s = (time.monotonic() - began) / count * (len(todo) - count)
            progress.update(bar, advance=1, description=f"cells, {left_s / 60:.0f} minutes left")
    return failed


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Yield processes of one thread each; on an error or Ctrl-C they are ended at once."""
    os.environ["OMP_NUM_THREADS"] = "1"  # theirs, for they start later
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        raise
    pool.shutdown()


def _run(cell: Cell, rounds: int, folder: str) -> dict[str, Any]:
    """Run one cell in a folder of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        return run(cell, rounds=rounds, folder=Path(own) / "run")


def wanted(options: argparse.Namespace, rates: dict[str, float]) -> list[Cell]:
    """Return the cells that the options name, in the order in which to run them."""
    if options.search:
        return list(search_cells())
    seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    parts = options.only or (PARTS[:2] if options.quick else PARTS)
    return [
        cell
        for cell in cells(rates)
        if cell.part in parts
        and cell.seed in seeds
        and (cell.partition == SKEWED or not options.quick)
    ]


def main() -> int:
    """Run what is not in the file yet, and print the table; exit code 1: a cell failed."""
    options = _options()
    found = json.loads(options.json.read_text()) if options.json.is_file() else {"rows": []}
    if found["rows"] and options.quick != found.get("quick", False) and not options.table:
        sys.exit(f"{options.json}: --quick and full results do not mix; use another --json")
    known = found_of(found["rows"])
    rates = rates_of(known) if options.tuned else {}
    if options.tuned and not rates:
        sys.exit(f"{options.json}: no search in it that --tuned could go by; run --search first")
    code = 0
    if not options.table:
        found |= {"machine": machine_facts(), "quick": options.quick}
        done = [row["cell"] for row in found["rows"]]
        todo = [cell for cell in wanted(options, rates) if cell.key not in done]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            code = min(run_all(todo, found, options), 1)
        except KeyboardInterrupt:
            code = INTERRUPTED
    _print(found_of(found["rows"]), rates, search=options.search)
    return code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.lora_rules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, help="results, read and added to")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cells at a time")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, help="of which seeds")
    parser.add_argument("--quick", action="store_true", help="two rounds: does it run at all?")
    parser.add_argument("--search", action="store_true", help="learning rates, by validation")
    parser.add_argument("--tuned", action="store_true", help="with the rates that --search found")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    return parser.parse_args()


def _print(found: dict[str, Any], rates: dict[str, float], *, search: bool) -> None:
    console = Console(width=160)
    if search:
        console.print(search_table(found))
        return
    every = list(cells(rates))
    console.print(table_of(every, found))
    for note in notes_of(every, found):
        console.print(note)


if __name__ == "__main__":
    sys.exit(main())
