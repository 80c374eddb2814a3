"""Small builders of files with records."""

from pathlib import Path

from intramural.data.readers import read_records
from intramural.data.records import Columns, Records

CANARY = "canary-8d1f"
"""Stands in bad rows; must be in no message."""

TWO = Columns(text="text", target="label")


def write(folder: Path, content: bytes | str, name: str = "notes.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(folder: Path, content: bytes | str, name: str = "notes.csv") -> Records:
    return read_records(write(folder, content, name), TWO)


def texts(records: Records) -> list[str]:
    return [record.text for record in records.records]
