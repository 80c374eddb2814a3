"""What does a differentially private step cost, next to a plain step of the same model?

All ways of one case take turns in one process, so that a busy machine slows them all; memory comes
from a process of its own for each. A step is forward, backward, clipping, noise from the
cryptographic generator, and the optimizer. No text is padded, the worst case for shared work.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch.nn import functional

from benchmarks.dp_cases import CASES, NOISE, OURS, PLAIN, Case, federation_of
from benchmarks.harness import Row, machine_facts, publish
from intramural.models.base import resolve_base
from intramural.models.loading import load_model
from intramural.models.private_training import ENGINES
from intramural.privacy.engine import Engine
from intramural.privacy.random import SecureRandom

Step = Callable[[], None]
CLIP_NORM, NOISE_MULTIPLIER = 0.1, 1.0
ALIKE = ("processor", "cores", "gpu", "versions")
"""Facts of the machine without which results do not stand in one table."""


def step_of(case: Case, way: str, device: str) -> tuple[Any, Step]:
    """Return the model and one step of it."""
    federation = federation_of(case)
    loaded = load_model(federation, resolve_base(case.base), device=device)
    model = loaded.model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = _batch(case, loaded.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = loaded.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused)
    if way == PLAIN:
        return model, _plain(model, optimizer, batch)
    if way == NOISE:
        return model, _noise([p.numel() for p in parameters])
    if way == "opacus ghost":
        return model, _ghost(model, optimizer, batch)
    kind = "opacus" if way == "opacus hooks" else "bookkeeping"
    engine: Engine = ENGINES[kind](
        model,
        optimizer,
        clip_norm=CLIP_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        divisor=float(case.rows // case.rows_per_unit),
        noise=SecureRandom.secret(),
    )
    engine.__enter__()
    rows = 8 if way == OURS else case.rows
    return model, _private(model, optimizer, engine, batch, rows=rows, unit=case.rows_per_unit)


def _batch(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (case.rows, case.length)
    ids = torch.randint(1000, 20000, shape, generator=generator)
    targets = torch.randint(0, 3, (case.rows,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "targets": targets}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def losses_of(model: Any, batch: dict[str, torch.Tensor], rows: slice) -> torch.Tensor:
    """Return one loss a row: cross-entropy of the class, or the mean over the row's tokens."""
    ids = batch["input_ids"][rows]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"][rows]).logits.float()
    if logits.ndim == 2:
        return functional.cross_entropy(logits, batch["targets"][rows], reduction="none")
    flat = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return flat.view(len(ids), -1).mean(1)


def _plain(model: Any, optimizer: Any, batch: dict[str, torch.Tensor]) -> Step:
    def step() -> None:
        losses_of(model, batch, slice(None)).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _noise(sizes: list[int]) -> Step:
    source = SecureRandom.secret()

    def step() -> None:
        for size in sizes:
            source.normal(size, std=NOISE_MULTIPLIER * CLIP_NORM)

    return step


def _private(
    model: Any, optimizer: Any, engine: Any, batch: dict[str, torch.Tensor], *, rows: int, unit: int
) -> Step:
    def step() -> None:
        for start in range(0, len(batch["input_ids"]), rows):
            part = slice(start, start + rows)
            count = len(batch["input_ids"][part])
            engine.open([row // unit for row in range(count)])
            engine.fold(losses_of(model, batch, part))
        engine.release()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _ghost(model: Any, optimizer: Any, batch: dict[str, torch.Tensor]) -> Step:
    """Opacus's ghost clipping as its documentation has it; position ids are given, or it fails."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    count, length = batch["input_ids"].shape
    places = torch.arange(length, device=batch["input_ids"].device).repeat(count, 1).contiguous()
    data = DataLoader(TensorDataset(batch["input_ids"], batch["targets"]), batch_size=count)
    wrapped, private, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        criterion=torch.nn.CrossEntropyLoss(),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )

    def step() -> None:
        private.zero_grad(set_to_none=True)
        output = wrapped(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=places,
            token_type_ids=torch.zeros_like(batch["input_ids"]),
        )
        criterion(output.logits, batch["targets"]).backward()
        private.step()

    return step


def time_rows(case: Case, *, device: str, repeats: int) -> list[Row]:
    """Measure all ways of a case in turn; ratios are medians of each turn's own."""
    made = {way: step_of(case, way, device) for way in case.ways}
    taken: dict[str, list[float]] = {way: [] for way in made}
    for repeat in range(repeats + 1):
        for way, (_, step) in made.items():
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            if repeat:  # the first turn warms up
                taken[way].append(time.perf_counter() - began)
    plain = taken.pop(PLAIN)
    rows = [Row(name=f"{case.name}: plain step", value=median(plain), unit="s", samples=plain)]
    for way, seconds in taken.items():
        ratios = [a / b for a, b in zip(seconds, plain, strict=True)]
        name = f"time, {way}"
        if way == NOISE:
            model, _ = made[way]
            draws = sum(p.numel() for p in model.parameters() if p.requires_grad)
            name = f"noise of {draws / 1e6:.1f}M draws / plain step"
        rows.append(_row(f"{case.name}: {name}", median(ratios), case.targets.get(way), ratios))
    return rows


def _row(name: str, value: float, target: float | None, samples: list[float]) -> Row:
    return Row(
        name=name,
        value=value,
        unit="ratio",
        target=f"<= {target:g}" if target else "",
        ok=value <= target if target else None,
        samples=samples,
    )


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def memory_rows(case: Case, *, device: str, threads: int) -> list[Row]:
    """Measure the peak above the model of each way, each in a process of its own."""
    peaks = {}
    for way in case.measured:
        command = [sys.executable, "-m", "benchmarks.dp_step", "--peak-of", case.name, way]
        command += ["--device", device, "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[way] = float(done.stdout.split()[-1])
    rows = [Row(name=f"{case.name}: plain memory above the model", value=peaks[PLAIN], unit="MiB")]
    for way, peak in peaks.items():
        if way != PLAIN:
            ratio = peak / peaks[PLAIN]
            rows.append(_row(f"{case.name}: memory, {way}", ratio, case.memory.get(way), [ratio]))
    return rows


def peak_mib(case: Case, way: str, device: str) -> float:
    """Return the most memory that three steps held above the loaded model, in MiB."""
    _, step = step_of(case, way, device)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step()
    done.set()
    watcher.join()
    peak: int = highest - before
    return peak / 2**20


def merged(path: Path, rows: list[Row], machine: dict[str, Any]) -> list[Row]:
    """Return the rows, among those of other cases that a file holds.

    `machine` learns when each of those was measured.

    Raises:
        SystemExit: The file is of another machine, or of other versions.
    """
    if not path.is_file():
        return rows
    before = json.loads(path.read_text(encoding="utf-8"))
    facts = before["machine"]
    if differing := [fact for fact in ALIKE if facts.get(fact) != machine.get(fact)]:
        raise SystemExit(f"{path}: measured with another {' and '.join(differing)}; name another")
    new = {_case_of(row) for row in rows}
    kept = [row for row in (Row(**told) for told in before["rows"]) if _case_of(row) not in new]
    dates = facts.get("cases", {})
    machine["cases"] |= {name: dates.get(name, facts["date"]) for name in map(_case_of, kept)}
    places = {name: place for place, name in enumerate(CASES)}
    return sorted([*kept, *rows], key=lambda row: places.get(_case_of(row), len(places)))


def _case_of(row: Row) -> str:
    return row.name.partition(": ")[0]


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.dp_step", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=list(CASES),
        help="run these alone, and leave the file's other rows as they are",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    if options.peak_of:
        case, way = options.peak_of
        print(peak_mib(CASES[case], way, options.device))
        return
    machine, rows = machine_facts(), []
    if options.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    names = options.cases or list(CASES)
    machine["cases"] = dict.fromkeys(names, machine["date"])
    for name in names:
        rows += time_rows(CASES[name], device=options.device, repeats=options.repeats)
        rows += memory_rows(CASES[name], device=options.device, threads=options.threads)
    if options.cases and options.json:
        rows = merged(options.json, rows, machine)
    publish("A private step against a plain one", rows, machine=machine, path=options.json)


if __name__ == "__main__":
    main()
