"""ReplyStore: the answers that cost something, kept until they are surely no longer asked for.

An answer is stored before it is sent. If it is lost on its way, or the worker dies, the same letter
gets the same bytes again: nothing is trained twice and no ledger is charged twice.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from intramural.core.canonical import canonical_json, digest_bytes, digest_json
from intramural.core.errors import JournalError
from intramural.core.files import write_atomic
from intramural.core.letter import Letter
from intramural.trust.keys import private_folder

ROUNDS_KEPT, RUNS_KEPT = 2, 4
"""Of each run its last rounds; of all runs the last ones. A vector may take gigabytes."""
SUFFIX = ".letter"
LINE_BYTES_MAX = 1 << 24
SLACK_BYTES = 1 << 24
"""Free beside a vector: an answer's header and seal, and lines of journal and ledger."""
PRIVATE_FILE = 0o600


class Unreadable(Exception):
    """A stored answer is not what was stored; its file is named."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where the answer to one letter is kept."""

    run: str
    """Names one run of one manifest."""
    round: int
    question: str
    """Names the letter and the manifest that it came under."""

    @classmethod
    def of(cls, question: Letter, *, manifest: str, run: str, round_: int) -> "Slot":
        """Return the slot of the answer to a letter.

        Args:
            question: The letter; header and vector count, its seal does not.
            manifest: Digest of the manifest under which it is answered.
            run: The run that it names.
            round_: The round that it names.
        """
        return cls(
            run=digest_json([manifest, run])[7:23],
            round=round_,
            question=question_of(question, manifest=manifest),
        )

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{self.run}.{self.round:06d}.{self.question}{SUFFIX}"

    @classmethod
    def of_file(cls, name: str) -> "Slot":
        """Return the slot that a file's name says."""
        run, round_, question = name.removesuffix(SUFFIX).split(".")
        return cls(run=run, round=int(round_), question=question)


def question_of(letter: Letter, *, manifest: str) -> str:
    """Return a name of a letter under a manifest, such as no other letter has."""
    vector = None if letter.vector is None else digest_bytes(letter.vector)
    return digest_json([manifest, letter.digest, vector])[7:]


class ReplyStore:
    """One site's stored answers: one file each, written by one process at a time.

    Guarantees:
        When `keep` has returned, the answer survives a crash and a power cut. `find` returns it to
        the bit, or nothing: a damaged file is never sent.
    """

    def __init__(
        self, folder: Path, *, rounds_kept: int = ROUNDS_KEPT, runs_kept: int = RUNS_KEPT
    ) -> None:
        """Open the store in a folder of its own, which nobody else may enter.

        Raises:
            TrustError: The folder cannot be made.
        """
        private_folder(folder)
        self._folder = folder
        self._rounds_kept = rounds_kept
        self._runs_kept = runs_kept
        for partial in folder.glob(".*.partial"):
            partial.unlink()  # a crash in the middle of `keep`; it was not sent

    def find(self, letter: Letter, *, manifest: str) -> tuple[Slot, Letter] | None:
        """Return the stored answer to this very letter, or None.

        Raises:
            Unreadable: There was one and it is damaged; it is gone now.
        """
        question = question_of(letter, manifest=manifest)
        for path in self._folder.glob(f"*.{question}{SUFFIX}"):
            answer = _read(path)
            if answer is None:
                path.unlink()
                raise Unreadable(path.name)
            return Slot.of_file(path.name), answer
        return None

    def check_room(self, vector_bytes: int) -> None:
        """Do nothing if the disk has room for one more answer with a vector of that size.

        Asked before anything is charged for the answer. A quota is not seen here, but by `keep`.

        Raises:
            JournalError: It has not.
        """
        needed = vector_bytes + SLACK_BYTES
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise JournalError(f"{self._folder}: {error.strerror}; restore it") from error
        if free < needed:
            raise JournalError(
                f"{self._folder}: no room to store an answer, which takes up to "
                f"{-(-needed >> 20)} MiB; free space"
            )

    def keep(self, slot: Slot, answer: Letter) -> None:
        """Store an answer, then drop those that nobody will ask for again.

        Raises:
            JournalError: The disk refuses.
        """
        try:
            _write(self._folder / slot.file, answer)
            self._drop_old()
        except OSError as error:
            raise JournalError(
                f"{self._folder}: cannot store an answer: {error.strerror}; free space"
            ) from error

    def _drop_old(self) -> None:
        paths = sorted(
            self._folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, reverse=True
        )
        by_run: dict[str, dict[int, list[Path]]] = {}
        for path in paths:
            slot = Slot.of_file(path.name)
            by_run.setdefault(slot.run, {}).setdefault(slot.round, []).append(path)
        for place, rounds in enumerate(by_run.values()):
            kept = sorted(rounds)[-self._rounds_kept :] if place < self._runs_kept else []
            for round_ in set(rounds) - set(kept):
                for path in rounds[round_]:
                    path.unlink()


def _write(path: Path, letter: Letter) -> None:
    """Write a letter under its digest, atomically; the vector is not copied."""
    fields = {"header": letter.header, "seal": letter.seal, "vector": letter.vector is not None}
    parts = (canonical_json(fields) + b"\n", letter.vector or b"")
    write_atomic(path, _digest(parts).encode() + b"\n", *parts, mode=PRIVATE_FILE)


def _read(path: Path) -> Letter | None:
    """Return the letter in a file, or None when the file is not what was written."""
    try:
        with open(path, "rb") as file:
            told = file.readline(LINE_BYTES_MAX)
            fields = file.readline(LINE_BYTES_MAX)
            vector = file.read()
    except OSError:
        return None
    if told != _digest((fields, vector)).encode() + b"\n":
        return None
    table = json.loads(fields)
    return Letter(
        header=table["header"], seal=table["seal"], vector=vector if table["vector"] else None
    )


def _digest(parts: Sequence[bytes]) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()
