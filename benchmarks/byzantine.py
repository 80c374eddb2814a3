"""What do hostile sites achieve, by rule and attack, without and with record-level privacy?

Ten sites with an equal deal of the short ICD-10-CM titles, two of them hostile, train a head on
the frozen MiniLM for 20 rounds; three seeds. The test titles are of categories that nobody trains
on. About 20 minutes on 2 idle cores; `--quick` takes one, and shows that it runs.

Titles are dealt one by one: the sites are alike but for chance, as the rules' guarantees want it.
`--deal categories` deals whole categories, so that sites differ, and an attack can hide in that.
What a hidden attack costs grows with the rounds, for it bends every step a little: `--rounds 80`
shows more of it.

    python -m benchmarks.byzantine --json FILE.json
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from rich.console import Console

from benchmarks.byzantine_attacks import ATTACKS, play
from benchmarks.byzantine_report import Cell, rows_of, tables
from benchmarks.byzantine_world import EPSILON, HOSTILE, IID, SITES, TRAINING, Choice, World
from benchmarks.harness import machine_facts
from intramural.core.files import write_json

ROUNDS, SEEDS = 20, (7, 8, 9)
CHOICES = (
    Choice(rule="fedavg"),
    Choice(rule="median"),
    Choice(rule="trimmed-mean"),
    Choice(rule="krum"),
    Choice(rule="multi-krum"),
    Choice(rule="geometric-median"),
    Choice(rule="centred-clipping"),
    Choice(rule="trimmed-mean", before="nnm"),
    Choice(rule="median", before="nnm"),
    Choice(rule="geometric-median", before="nnm"),
    Choice(rule="median", before="bucketing"),
    Choice(rule="geometric-median", before="bucketing"),
    Choice(rule="centred-clipping", before="bucketing"),
)
QUICK_CHOICES = (CHOICES[0], CHOICES[7])
QUICK_ATTACKS = ("none", "sign-flip x10", "backdoor")
QUICK_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Part:
    """Federations that one process runs one after the other: a rule under all attacks."""

    private: bool
    seed: int
    choice: Choice
    attacks: tuple[str, ...]
    rounds: int
    deal: str


@lru_cache(maxsize=1)
def _world(seed: int, rounds: int, private: bool, deal: str) -> World:
    return World(seed=seed, rounds=rounds, private=private, deal=deal)


def run_part(part: Part) -> list[Cell]:
    """Return a part's cells."""
    world = _world(part.seed, part.rounds, part.private, part.deal)
    return [
        Cell(
            private=part.private,
            seed=part.seed,
            rule=part.choice.name,
            attack=attack,
            **asdict(play(world, part.choice, attack)),
        )
        for attack in part.attacks
    ]


def run_all(
    parts: Sequence[Part], *, workers: int, console: Console, kept: Path | None
) -> list[Cell]:
    """Return all cells in the order of the parts; each process sends every text through once.

    With `kept`, parts whose cells are in that file are not run, and others are added to it.
    """
    known = _read(kept)
    found = {place: known[key] for place, part in enumerate(parts) if (key := _key(part)) in known}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {
            pool.submit(run_part, part): place
            for place, part in enumerate(parts)
            if place not in found
        }
        for done in as_completed(waiting):
            place = waiting[done]
            found[place], part = done.result(), parts[place]
            if kept is not None:
                line = {"part": _key(part), "cells": [asdict(cell) for cell in found[place]]}
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            side = f"epsilon {EPSILON:g}" if part.private else "no privacy"
            console.print(f"{len(found)}/{len(parts)}: {side}, {part.seed}, {part.choice.name}")
    return [cell for place in range(len(parts)) for cell in found[place]]


def _key(part: Part) -> str:
    """Return all that decides a part's cells, as text."""
    return json.dumps(asdict(part) | {"training": TRAINING[part.private]}, sort_keys=True)


def _read(kept: Path | None) -> dict[str, list[Cell]]:
    """Return the cells of an earlier run by part."""
    if kept is None or not kept.is_file():
        return {}
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    return {line["part"]: [Cell(**cell) for cell in line["cells"]] for line in lines}


def main() -> None:
    """Run the federations, print the tables, and write the JSON file."""
    parser = argparse.ArgumentParser(prog="benchmarks.byzantine", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test; its numbers mean little"
    )
    parser.add_argument("--kept", type=Path, help="keep parts in this file, and go on from it")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each federation")
    parser.add_argument(
        "--deal", default=IID, help="of the titles: iid, categories, or dirichlet:ALPHA"
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    machine, console = machine_facts(), Console(width=200)
    quick: bool = options.quick
    parts = [
        Part(
            private=private,
            seed=seed,
            choice=choice,
            attacks=QUICK_ATTACKS if quick else tuple(ATTACKS),
            rounds=QUICK_ROUNDS if quick else options.rounds,
            deal=options.deal,
        )
        for private in (False, True)
        for seed in (SEEDS[:1] if quick else SEEDS)
        for choice in (QUICK_CHOICES if quick else CHOICES)
    ]
    cells = run_all(parts, workers=options.workers, console=console, kept=options.kept)
    rows = rows_of(cells)
    for table in tables(cells):
        console.print(table)
    for row in rows:
        if row.ok is not None:
            met = "met" if row.ok else "NOT MET"
            console.print(f"{row.name}: {row.value:.1f} {row.unit}, {row.target}: {met}")
    if options.json is not None:
        size = {
            "sites": SITES,
            "hostile": HOSTILE,
            "rounds": parts[0].rounds,
            "deal": options.deal,
            "training": {"plain": TRAINING[False], "private": TRAINING[True]},
        }
        result = {"machine": machine, "size": size, "rows": [asdict(row) for row in rows]}
        write_json(options.json, result)


if __name__ == "__main__":
    main()
