"""Canaries: unique words in a site's records, and the search for them in every form of bytes.

All canaries of a run begin with one random stem, which stands nowhere else. So the search is for
the stem in each form: it finds every canary in that form, and also one that was cut off.
"""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import numpy as np

LETTERS = "bcdfghjklmnpqrstvwxz"
"""Of a stem: without vowels no word of a text, a log or a program begins like it."""
STEM_PARTS = (4, 6)
TAIL_LETTERS = 5
OVERLAP_BYTES = 1 << 12
PIECE_BYTES = 1 << 24
HEX_DIGEST = re.compile(rb"[0-9a-fA-F]{64}")


class Tokenizer(Protocol):
    """What a model's tokenizer can do."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return a text's token ids."""

    def tokenize(self, text: str) -> list[str]:
        """Return a text's tokens, as they are spelt."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """Where a canary was found."""

    where: str
    form: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """The words of one run."""

    words: tuple[str, ...]
    """Each is the stem and a tail of its own."""
    stem: str
    tokenizer: Tokenizer = field(repr=False)

    def forms(self, word: str) -> dict[str, bytes]:
        """Return how a word may stand in bytes, by the name of the form."""
        pieces = self.tokenizer.tokenize(word)
        spelt = {"tokens": repr(pieces)[1:-1], "tokens, JSON": json.dumps(pieces)[1:-1]}
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        return {**_of_text(word), **_of_ids(ids), **{k: v.encode() for k, v in spelt.items()}}

    def search(self, content: bytes, *, where: str) -> list[Hit]:
        """Return where a canary stands in some bytes, at most once a form."""
        found = {form: content.find(needle) for form, needle in self.forms(self.stem).items()}
        for digest in HEX_DIGEST.finditer(content):
            if digest.group().lower() in self._digests:
                found["SHA-256"] = digest.start()
        return [
            Hit(where=where, form=form, offset=offset)
            for form, offset in found.items()
            if offset >= 0
        ]

    @cached_property
    def _digests(self) -> frozenset[bytes]:
        """Hexadecimal, of each word: who knows the names of persons could look them up."""
        return frozenset(hashlib.sha256(word.encode()).hexdigest().encode() for word in self.words)

    def search_file(self, path: Path) -> list[Hit]:
        """Return where a canary stands in a file or its name; it is read piece by piece."""
        hits = self.search(str(path).encode(), where=f"name of {path}")
        before = b""
        with open(path, "rb") as file:
            while piece := file.read(PIECE_BYTES):
                hits += self.search(before + piece, where=str(path))
                before = piece[-OVERLAP_BYTES:]
        return hits


def new_canaries(count: int, tokenizer: Tokenizer) -> Canaries:
    """Return so many canaries of a new stem."""
    first, second = (_letters(size) for size in STEM_PARTS)
    # capital letters, an accent, a slash and an ampersand make the forms differ from each other
    stem = f"{first.capitalize()}ü/&{second.capitalize()}"
    tails: set[str] = set()
    while len(tails) < count:
        tails.add(_letters(TAIL_LETTERS))
    words = tuple(f"{stem}{tail}" for tail in sorted(tails))
    return Canaries(words=words, stem=stem, tokenizer=tokenizer)


def _letters(size: int) -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(size))


def _of_text(word: str) -> dict[str, bytes]:
    plain = word.encode()
    forms = {
        "plain": plain,
        "lower case": word.lower().encode(),
        "upper case": word.upper().encode(),
        "latin-1": word.encode("latin-1"),
        "UTF-16 LE": word.encode("utf-16-le"),
        "UTF-16 BE": word.encode("utf-16-be"),
        "UTF-32 LE": word.encode("utf-32-le"),
        "hex": plain.hex().encode(),
        "hex, upper case": plain.hex().upper().encode(),
        "URL": quote(word, safe="").encode(),
        "URL, slash kept": quote(word).encode(),
        "JSON": json.dumps(word)[1:-1].encode(),
        "HTML": word.replace("&", "&amp;").encode(),
        "without accents": word.replace("ü", "u").lower().encode(),
    }
    for shift in range(3):
        forms[f"base64, shift {shift}"] = _base64(plain, shift, base64.b64encode)
        forms[f"base64 for URLs, shift {shift}"] = _base64(plain, shift, base64.urlsafe_b64encode)
    return forms


def _base64(content: bytes, shift: int, encode: Callable[[bytes], bytes]) -> bytes:
    """Return the digits of a content's base64 that do not hang on its neighbours."""
    digits = encode(b"\0" * shift + content)
    begin = (0, 2, 3)[shift]
    return digits[begin : (shift + len(content)) * 8 // 6]


def _of_ids(ids: Sequence[int]) -> dict[str, bytes]:
    forms = {
        f"ids, {order}{kind}": np.array(ids, dtype=f"{sign}{kind}").tobytes()
        for order, sign in (("", "<"), ("big-endian ", ">"))
        for kind in ("i2", "i4", "i8", "f4")
    }
    for name, between in (("JSON", ", "), ("JSON, tight", ","), ("text", " "), ("lines", "\n")):
        forms[f"ids, {name}"] = between.join(map(str, ids)).encode()
    return forms


def files_below(folder: Path, *, but: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield the regular files below a folder, but for some."""
    left_out = {path.resolve() for path in but}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.resolve() not in left_out:
            yield path


def told(hits: Sequence[Hit]) -> Mapping[str, list[str]]:
    """Return hits as a table from place to forms, for a message that shows no canary."""
    table: dict[str, list[str]] = {}
    for hit in hits:
        table.setdefault(hit.where, []).append(f"{hit.form} at {hit.offset}")
    return table
