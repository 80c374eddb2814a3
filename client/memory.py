"""Memory: what a site keeps of a run from round to round, in its own folder; it never leaves.

`memory/RUN/SITE/ROUND.safetensors` beside the ledger holds flat float32 vectors by name, as they
were after a round. The last four are kept: a round that is tried again starts from what the round
before left, and not from what its own first attempt did; and a coordinator that lost two of its
three checkpoints goes back two rounds more.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from intramural.core.errors import DataRefused, Refused
from intramural.core.files import write_atomic, write_json
from intramural.core.layout import Vector

MEMORY = "memory"
"""Folder beside the ledger."""
GENERATIONS = 4
"""Rounds of a run that are kept."""
SUFFIX = ".safetensors"
NOTE = "run.json"
"""File in a run's folder that says which run it is."""


class SiteMemory:
    """One site's vectors of each run, on disk; of requests that name no run, in this process.

    Guarantees:
        What was kept under one manifest is never found under another, whatever name the coordinator
        gives a run: what training without privacy left does not enter a run under [privacy].
    """

    def __init__(self, folder: Path, site: str, *, manifest: str, durable: bool = True) -> None:
        """Read nothing yet.

        Args:
            folder: Holds all runs' memories.
            site: The site's name.
            manifest: Digest of the federation's manifest.
            durable: Whether what is kept must survive a power cut, and not only a killed process.
        """
        self._folder = folder
        self._site = site
        self._manifest = manifest
        self._durable = durable
        self._fleeting: dict[int, dict[str, Vector]] = {}

    def before(self, run: str, round_: int) -> dict[str, Vector]:
        """Return what the last round before `round_` left, by name; {} when there was none.

        Raises:
            DataRefused: The file cannot be read; or the coordinator went back further than the
                rounds that are kept.
        """
        kept = self._kept(run)
        earlier = [number for number in kept if number < round_]
        if not earlier:
            if len(kept) >= GENERATIONS:  # so earlier ones were forgotten
                raise DataRefused(
                    f"the coordinator went back to round {round_}, and the site keeps nothing of "
                    f"rounds before {min(kept)}; begin a new run"
                )
            return {}
        if not run:
            return self._fleeting[max(earlier)]
        path = self._file(run, max(earlier))
        try:
            return {name: np.asarray(values) for name, values in load_file(path).items()}
        except (OSError, SafetensorError):
            raise DataRefused(
                f"{path.name} in the site's memory of the run cannot be read; restore it, or "
                "remove it to go on from the federation's start"
            ) from None

    def write(self, run: str, round_: int, vectors: Mapping[str, Vector]) -> None:
        """Keep what a round left, whole or not at all; forget all but the last round before it.

        Rounds after it are forgotten, too: the coordinator undid them.

        Raises:
            Refused: The disk does not take it.
        """
        kept = self._kept(run) | {round_}
        last = sorted(number for number in kept if number <= round_)[-GENERATIONS:]
        if not run:
            self._fleeting[round_] = dict(vectors)
            self._fleeting = {number: self._fleeting[number] for number in last}
            return
        try:
            self._name(run)
            content = save({name: np.ascontiguousarray(v) for name, v in vectors.items()})
            write_atomic(self._file(run, round_), content, mode=0o600, sync=self._durable)
            for number in kept - set(last):
                self._file(run, number).unlink(missing_ok=True)
        except OSError as error:
            raise Refused(
                f"the site's memory of the run cannot be written: {error.strerror}; free space"
            ) from None

    def _kept(self, run: str) -> set[int]:
        """Return the rounds of which something is kept."""
        if not run:
            return set(self._fleeting)
        names = [path.name for path in self._place(run).glob(f"*{SUFFIX}")]
        numbers = (name.removesuffix(SUFFIX) for name in names)
        return {int(number) for number in numbers if number.isdigit()}

    def runs(self) -> list[str]:
        """Return the runs of which the site keeps something under this manifest, oldest first."""
        found = []
        for note in self._folder.glob(f"*/{NOTE}"):
            facts = json.loads(note.read_text())
            mine = list((note.parent / self._site).glob(f"*{SUFFIX}"))
            if facts["manifest"] == self._manifest and mine:
                found.append((max(path.stat().st_mtime_ns for path in mine), str(facts["run"])))
        return [run for _, run in sorted(found)]

    def _name(self, run: str) -> None:
        """Note beside what is kept of a run whose it is; its folder's name does not tell."""
        note = self._place(run).parent / NOTE
        if not note.is_file():
            facts = {"manifest": self._manifest, "run": run}
            write_json(note, facts, sync=self._durable)

    def _file(self, run: str, round_: int) -> Path:
        return self._place(run) / f"{round_}{SUFFIX}"

    def _place(self, run: str) -> Path:
        """Return a run's folder; `run` is the coordinator's word, and so no name of a file."""
        key = hashlib.sha256(f"{self._manifest} {run}".encode()).hexdigest()[:16]
        return self._folder / key / self._site
