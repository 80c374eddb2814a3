"""Tiny federations and sites, of the fixture's 200 rows; imports no torch."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from intramural.core.config import check_config
from intramural.core.federation import FederationConfig

CSV = Path(__file__).parent / "fixtures" / "icd10_200.csv"
LABELS = ("circulatory", "digestive", "mental", "respiratory")
Row = dict[str, str]
Json = dict[str, Any]


def rows() -> list[Row]:
    """Return the fixture's 200 rows, the four chapters in turn."""
    with open(CSV, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return [row for start in range(50) for row in table[start::50]]


def table(base: Path, **sections: Json) -> Json:
    """Return a federation.toml of two rounds of classification; a section's keys are replaced."""
    content: Json = {
        "federation": {"name": "tiny", "rounds": 2, "seed": 7},
        "model": {"base": str(base), "max_length": 32},
        "task": {"kind": "classification", "labels": list(LABELS)},
        "exchange": {"kind": "lora", "rank": 2, "alpha": 4.0},
        "training": {
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "batch_size": 8,
            "local_steps": 2,
        },
        "sites": {"min": 1},
    }
    for section, keys in sections.items():
        content[section] = content.get(section, {}) | keys
    return content


def federation(base: Path, **sections: Json) -> FederationConfig:
    """Return the federation of `table`."""
    return check_config(table(base, **sections), FederationConfig, source="test")


def generation(base: Path, **sections: Json) -> FederationConfig:
    """Return a federation that learns titles from codes, on the tiny Llama."""
    content = table(base, **sections)
    content["task"] = {"kind": "generation", "instruction": "title of {text}", "new_tokens_max": 4}
    content["exchange"].setdefault("target_modules", ["q_proj", "v_proj"])
    return check_config(content, FederationConfig, source="test")


def site(
    folder: Path,
    name: str,
    records: Iterable[Row],
    *,
    full: bool = False,
    kind: str = "classification",
    **sections: Json,
) -> Path:
    """Write a site's folder and return its site.toml; a section's keys are replaced."""
    target = {"label": "chapter"} if kind == "classification" else {"response": "title"}
    content: Json = {
        "site": {"name": name},
        "data": {
            "path": "records.jsonl",
            "text": "title" if kind == "classification" else "code",
            **target,
        },
        "policy": {"require_privacy": False, "exchange": ["full" if full else "lora"]},
        "compute": {"device": "cpu", "threads": 1},
    }
    for section, keys in sections.items():
        content[section] = content.get(section, {}) | keys
    home = folder / name
    home.mkdir(parents=True)
    lines = [json.dumps(record) for record in records]
    (home / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (home / "site.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    return home / "site.toml"


def sites(folder: Path, count: int, *, records: Sequence[Row] = (), full: bool = False) -> Path:
    """Write `count` sites that share the rows in turn; return the folder that holds them."""
    rows_ = records or rows()
    for number in range(count):
        site(folder, f"site-{number + 1}", rows_[number::count], full=full)
    return folder
