"""How long does a round's aggregation take, and how much memory, next to Flower's FedAvg?

Ours folds each reply as it arrives and drops it; Flower keeps all replies and then averages.
Both clocks run from replies in memory to the new arrays encoded for the next round; making the
replies is outside. Each figure of memory comes from a process of its own: the most it ever held
beyond what it held when the first model existed, in models.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from benchmarks.harness import Row, machine_facts, publish
from intramural.core.layout import Layout, Vector
from intramural.core.messages import Update
from intramural.core.wire import decode_reply, encode, encode_vector
from intramural.simulations.inprocess import InProcessGrid
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.rule import Fold

ARRAYS = 10
"""Named arrays that a model has on Flower's side."""
SITES_OFTEN = 10
"""Up to so many sites are measured nine times; more, three times."""
HEADROOM = 1.5
"""Flower's replies must fit this many times into the memory that is free."""
MODELS_MAX = 3.0
"""A sum of two models and a reply of one, whatever the number of sites ..."""
SCRATCH_MAX = 4 << 20
"""... and bytes of the threads' scratch, whatever the size of the model."""
WAYS = ("ours", "flower")


def layout_of(elements: int) -> Layout:
    """Return a layout of `ARRAYS` arrays, as even as can be."""
    edges = [elements * i // ARRAYS for i in range(ARRAYS + 1)]
    return Layout(tuple((f"w{i}", (edges[i + 1] - edges[i],)) for i in range(ARRAYS)))


def random_vector(layout: Layout, seed: int) -> Vector:
    """Return small numbers of both signs."""
    vector = np.random.default_rng(seed).random(layout.size, dtype=np.float32)
    vector -= np.float32(0.5)
    return vector


def our_reply(layout: Layout, vector: Vector, site: int) -> RecordDict:
    """Return a reply as the coordinator takes it from Flower."""
    update = Update(
        site=f"site-{site}",
        round=1,
        layout=layout.digest,
        weight=100 + site,
        loss=1.0,
        seconds=1.0,
        delta=vector,
    )
    return encode(update)


def flower_reply(layout: Layout, vector: Vector, site: int) -> Message:
    """Return a reply as Flower's strategies take it."""
    arrays = ArrayRecord({n: Array(a) for n, a in layout.unflatten(vector).items()})
    metrics = MetricRecord({"num-examples": 100 + site})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), site + 1, "train")


def fold_in(rule: FedAvg, fold: Fold, records: RecordDict, layout: Layout) -> None:
    """Read one reply and add it, as the coordinator does."""
    update = decode_reply(records, layout=layout)
    assert isinstance(update, Update)
    rule.add(fold, update)


def time_ours(rule: FedAvg, layout: Layout, sites: int, *, seed: int) -> tuple[float, float]:
    """Return seconds of decoding, adding, finishing and encoding; and those after the last reply.

    The second figure is what a round waits for: ours adds while it waits for other sites, Flower's
    strategies begin when all replies are there. Here all replies are there before the clock starts,
    as Flower's are: each side then reads memory that has settled. What ours holds at once in real
    rounds is measured by `memory_rows`.
    """
    current = np.zeros(layout.size, dtype=np.float32)
    replies = [our_reply(layout, random_vector(layout, seed + s), s) for s in range(sites)]
    began = time.perf_counter()
    fold = rule.begin({}, current, round=1)
    for records in replies:
        last = time.perf_counter()
        fold_in(rule, fold, records, layout)
    vector, _ = rule.finish(fold)
    encode_vector(vector)
    ended = time.perf_counter()
    return ended - began, ended - last


def time_flower(layout: Layout, sites: int, *, seed: int) -> float:
    """Return seconds of `aggregate_train`; it reads the replies and encodes the result."""
    replies = [flower_reply(layout, random_vector(layout, seed + s), s) for s in range(sites)]
    began = time.perf_counter()
    FlowerFedAvg().aggregate_train(1, replies)
    return time.perf_counter() - began


def fits(layout: Layout, sites: int) -> bool:
    """Return whether Flower's replies of a round fit into this machine's free memory."""
    free: int = psutil.virtual_memory().available
    return HEADROOM * (sites + 3) * layout.nbytes < free


def time_rows(layout: Layout, sites: int) -> list[Row]:
    """Measure both ways in turn, so that a busy machine slows both."""
    peer_fits = fits(layout, sites)
    ours, after, flower = [], [], []
    rule = FedAvg()
    time_ours(rule, layout, 1, seed=0)  # a run's first round touches the sum's memory
    for repeat in range(9 if sites <= SITES_OFTEN else 3):
        total, tail = time_ours(rule, layout, sites, seed=1000 * repeat)
        ours.append(total)
        after.append(tail)
        if peer_fits:
            flower.append(time_flower(layout, sites, seed=1000 * repeat))
    name = f"aggregation, {sites} sites"
    if not flower:
        why = f"Flower's replies need {sites * layout.nbytes / 1e9:.1f} GB; not run"
        return [Row(name=f"{name}: ours", value=median(ours), unit="s", peer=why, samples=ours)]
    ratios = [a / b for a, b in zip(ours, flower, strict=True)]
    waits = [a / b for a, b in zip(after, flower, strict=True)]
    peer = "flwr FedAvg.aggregate_train"
    return [
        Row(name=f"{name}: ours", value=median(ours), unit="s", samples=ours),
        Row(name=f"{name}: Flower", value=median(flower), unit="s", samples=flower),
        Row(
            name=f"{name}: time ours / Flower",
            value=median(ratios),
            unit="ratio",
            target="<= 1",
            ok=median(ratios) <= 1,
            peer=peer,
            samples=ratios,
        ),
        Row(
            name=f"{name}: wait after the last reply, ours / Flower",
            value=median(waits),
            unit="ratio",
            target="<= 1",
            ok=median(waits) <= 1,
            peer=peer,
            samples=waits,
        ),
    ]


def memory_rows(elements: int, sites: int) -> list[Row]:
    """Measure each way's peak in a process of its own."""
    layout, rows = layout_of(elements), []
    for way in WAYS:
        name = f"peak memory, {sites} sites: {way}"
        if way == "flower" and not fits(layout, sites):
            rows.append(Row(name=name, value=None, unit="models", target="too little memory free"))
            continue
        command = [sys.executable, "-m", "benchmarks.aggregation", "--elements", str(elements)]
        command += ["--sites", str(sites), "--peak-of", way]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        models = float(done.stdout)
        ours = way == "ours"
        rows.append(
            Row(
                name=name,
                value=models,
                unit="models",
                target=f"<= {MODELS_MAX:g} + {SCRATCH_MAX >> 20} MiB" if ours else "",
                ok=models <= MODELS_MAX + SCRATCH_MAX / layout.nbytes if ours else None,
                samples=[models],
            )
        )
    return rows


def peak_models(way: str, elements: int, sites: int) -> float:
    """Return the most memory this process held beyond the first model, in models.

    Replies are read from a file, as they would be from a socket: their making needs no memory.
    """
    layout = layout_of(elements)
    measure = _peak_ours if way == "ours" else _peak_flower
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vector"
        script = "import sys, numpy; numpy.full(int(sys.argv[1]), .25, '<f4').tofile(sys.argv[2])"
        subprocess.run([sys.executable, "-c", script, str(elements), str(file)], check=True)
        current = np.fromfile(file, dtype=np.float32)
        before = psutil.Process().memory_info().rss
        measure(layout, current, sites, file.read_bytes)
    extra_bytes: int = _most_memory() - before
    return extra_bytes / layout.nbytes


def _peak_ours(layout: Layout, current: Vector, sites: int, receive: Callable[[], bytes]) -> None:
    rule = FedAvg()
    fold = rule.begin({}, current, round=1)
    template = our_reply(layout, np.zeros(0, dtype=np.float32), 0)
    for _ in range(sites):
        array = Array("float32", (layout.size,), "intramural.f4", receive())
        template.array_records["vector"]["flat"] = array
        del array
        fold_in(rule, fold, template, layout)
        del template.array_records["vector"]["flat"]
    encode_vector(rule.finish(fold)[0])


def _peak_flower(layout: Layout, current: Vector, sites: int, receive: Callable[[], bytes]) -> None:
    del current
    replies = [
        flower_reply(layout, np.frombuffer(receive(), dtype=np.float32), site)
        for site in range(sites)
    ]
    FlowerFedAvg().aggregate_train(1, replies)


def _most_memory() -> int:
    """Return the high-water mark of this process's resident memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.aggregation", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--elements", type=int, default=22_000_000, help="of one model")
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    InProcessGrid(ClientApp(), 1, run_config={})  # Flower's messages need a process's identity
    if options.peak_of:
        print(peak_models(options.peak_of, options.elements, options.sites[0]))
        return
    machine, rows = machine_facts(), []
    for sites in options.sites:
        rows += memory_rows(options.elements, sites)
        rows += time_rows(layout_of(options.elements), sites)
    title = f"Aggregation of {options.elements:,} float32 ({4 * options.elements / 1e6:.0f} MB)"
    publish(title, rows, machine=machine, path=options.json)


if __name__ == "__main__":
    main()
