"""Checkpoints: the last committed round on disk, three generations, whole or not there."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from intramural.core.canonical import canonical_json, digest_bytes, digest_json, digest_vector
from intramural.core.errors import CheckpointError
from intramural.core.files import sync_folder, write_atomic
from intramural.core.layout import Vector
from intramural.core.threads import thread_pool
from intramural.server.history import NOTHING, read_history, write_history

GENERATIONS = 2
"""That stand while the next is written, and then it is three."""
_STATE, _START = "state/", "start/"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that a run needs to go on after a committed round."""

    round: int
    """The round committed; 0 before the first."""
    manifest: str
    """Digest of the manifest the run goes by."""
    layout: str
    """Digest of the layout of `vector`."""
    vector: Vector = field(repr=False)
    state: dict[str, NDArray[Any]] = field(repr=False)
    """The rule's state."""
    history: list[dict[str, Any]] = field(repr=False)
    """What the report says of each round so far."""
    flights: dict[str, tuple[int, float]] = field(default_factory=dict)
    """With [asynchrony]: who trains, from which round's arrays, and until when that is waited for,
    on the coordinator's clock."""
    starts: dict[int, Vector] = field(default_factory=dict, repr=False)
    """The arrays that those rounds started from; at most asynchrony.staleness_max of them."""
    world: dict[str, Any] = field(default_factory=dict, repr=False)
    """What a simulation needs beside, to go on as if it had not stopped; see `Setting.world`."""


def _paths(folder: Path, round_: int) -> tuple[Path, Path]:
    stem = f"round-{round_:06d}"
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"


def _digest_arrays(vector: str, others: Mapping[str, NDArray[Any]]) -> str:
    """Return the digest of a checkpoint's arrays, of which the vector's is known."""
    rest = {n: [a.dtype.str, list(a.shape), digest_bytes(a.data)] for n, a in others.items()}
    return digest_json({"vector": vector, "state": rest})


def _make_room(folder: Path, *, below: str) -> None:
    """Remove all but the last two checkpoints, and what a run that was killed left half written.

    Before the next one is written, not after: the system then has their memory at hand for it,
    which takes a fifth of the time. `below`: its name. Those of its round and later do not count:
    a run that goes on from an older one found them harmed.
    """
    names = sorted(os.listdir(folder))
    for left_over in (name for name in names if name.endswith(".partial")):
        (folder / left_over).unlink()
    facts = [name for name in names if name.startswith("round-") and name.endswith(".json")]
    for old in [name for name in facts if name < below][:-GENERATIONS]:
        (folder / old).unlink()
        (folder / old).with_suffix(".safetensors").unlink(missing_ok=True)


@cache
def _hasher() -> Executor:
    """Return the thread that hashes; to start one takes longer than to hash a small model."""
    return thread_pool(1, name="checkpoint")


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, sync: bool = True) -> str:
    """Write a checkpoint beside the last two, and return the vector's digest.

    The arrays are on disk under their name, and the round's record in the history, before the small
    file that vouches for both (round, SHA-256) is. The arrays are hashed while they are written,
    for each takes as long. A crash in between leaves the generation before as the newest. Without
    `sync` that holds for a process that is killed, and not for a power cut.

    Raises:
        CheckpointError: The disk refused; the generation before is untouched.
    """
    arrays_path, facts_path = _paths(folder, checkpoint.round)
    partial = arrays_path.with_suffix(f".{os.getpid()}.partial")
    named = {_STATE + name: np.ascontiguousarray(a) for name, a in checkpoint.state.items()}
    named |= {f"{_START}{round_}": vector for round_, vector in checkpoint.starts.items()}
    before = _history_before(_paths(folder, checkpoint.round - 1)[1])
    try:
        hashed = _hasher().submit(digest_vector, checkpoint.vector)
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, below=facts_path.name)
        history = write_history(folder, checkpoint.history, before=before, sync=sync)
        save_file({"vector": checkpoint.vector, **named}, partial)
        if sync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        vector = hashed.result()
        os.replace(partial, arrays_path)
        if sync:
            sync_folder(folder)
        facts = {
            "round": checkpoint.round,
            "manifest": checkpoint.manifest,
            "layout": checkpoint.layout,
            "arrays": _digest_arrays(vector, named),
            "history": history,
        }
        if checkpoint.flights or checkpoint.world:
            facts |= {"flights": checkpoint.flights, "world": checkpoint.world}
        told = canonical_json(facts | {"digest": digest_json(facts)})
        write_atomic(facts_path, told + b"\n", sync=sync)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{arrays_path}: cannot write: {error}; free space there") from error
    return vector


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, and a line on each that is not.

    Raises:
        CheckpointError: There are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for facts_path in sorted(folder.glob("round-*.json"), reverse=True):
        try:
            return _load(facts_path), problems
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            problems.append(f"{facts_path.name}: {type(error).__name__}: not whole, passed over")
    if problems:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole ({'; '.join(problems)}); "
            "restore the folder, or start again in a new one"
        )
    return None, problems


def _facts_of(facts_path: Path) -> dict[str, Any]:
    """Return the small file's facts.

    Raises:
        OSError, ValueError, KeyError, TypeError: They are not what was written.
    """
    facts = dict(json.loads(facts_path.read_bytes()))
    if facts.pop("digest") != digest_json(facts):
        raise ValueError("digest of the facts")
    return facts


def _history_before(facts_path: Path) -> dict[str, Any]:
    """Return what the checkpoint before vouches for of the history; nothing if it is not whole."""
    try:
        return dict(_facts_of(facts_path)["history"])
    except (OSError, ValueError, KeyError, TypeError):
        return NOTHING


def _load(facts_path: Path) -> Checkpoint:
    facts = _facts_of(facts_path)
    arrays = load_file(facts_path.with_suffix(".safetensors"))
    vector = arrays.pop("vector")
    if _digest_arrays(digest_vector(vector), arrays) != facts["arrays"]:
        raise ValueError("digest of the arrays")
    return Checkpoint(
        round=facts["round"],
        manifest=facts["manifest"],
        layout=facts["layout"],
        vector=vector,
        state=_below(_STATE, arrays),
        history=read_history(facts_path.parent, facts["history"]),
        flights={site: (int(r), s) for site, (r, s) in facts.get("flights", {}).items()},
        starts={int(number): array for number, array in _below(_START, arrays).items()},
        world=facts.get("world", {}),
    )


def _below(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
