"""Write docs/configuration.md from the pydantic models: `python docs/make_configuration.py`."""

import json
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from intramural.core.federation import FederationConfig
from intramural.core.records_file import HoldoutConfig
from intramural.core.site import SiteConfig

TARGET = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

Made from the code by `python docs/make_configuration.py`; do not edit by hand.

Two TOML files, and a third where the coordinator judges rounds by records of its own. Unknown keys
are refused. `intramural check FILE` names every problem at once.
Keys marked **required** have no default.

What the keys of `[privacy]`, `[site_privacy]` and of the ledger do together: [privacy](privacy.md).

`policy.approve`, `policy.approvers` and `policy.hours` bind a deployed site; a simulation asks
nobody, at any hour.
"""
WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}


def render() -> str:
    """Return the content of docs/configuration.md."""
    parts = [HEAD]
    parts += _file("federation.toml", "The coordinator and all sites share it.", FederationConfig)
    parts += _file("site.toml", "Each site writes its own, and nobody else sees it.", SiteConfig)
    own = "Records of the coordinator's own, for `--holdout` and `gate.judge = 'coordinator'`."
    parts += _file("holdout.toml", own, HoldoutConfig)
    return "\n".join(parts)


def _file(name: str, about: str, model: type[BaseModel]) -> list[str]:
    lines = [f"## {name}", "", about, ""]
    for key, field in model.model_fields.items():
        table = _section(field.annotation)
        needed = "required" if field.is_required() else "optional"
        lines += [f"### [{key}]", "", f"{_sentence(field)} ({needed})", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        if table is None:
            lines += ['| `"NAME"` | text | | a folder, an installed package or a hub id |', ""]
            continue
        lines += [_row(inner, facts) for inner, facts in table.model_fields.items()]
        lines.append("")
    return lines


def _section(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) or (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _row(name: str, field: FieldInfo) -> str:
    if field.is_required():
        default = "**required**"
    else:
        value = field.get_default(call_default_factory=True)
        default = "absent" if value is None else f"`{_toml(value)}`"
    cells = [f"`{name}`", _kind(field.annotation, field.metadata), default, _sentence(field)]
    return f"| {' | '.join(cells)} |"


def _toml(value: Any) -> str:
    """Return a default as TOML spells it; JSON does, but for tables."""
    if isinstance(value, float) and value == int(value):
        return f"{value:.1f}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str)


def _sentence(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def _kind(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """Return a type in words, with its bounds."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(inner[0], inner[1:])
    if origin in (types.UnionType, typing.Union):
        return _kind(next(i for i in inner if i is not type(None)), metadata)
    if origin is typing.Literal:
        return " or ".join(f'`"{choice}"`' for choice in inner)
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return "table"
    return ", ".join([WORDS[annotation], *_bounds(metadata)])


def _bounds(metadata: typing.Sequence[Any]) -> list[str]:
    """Return the bounds that pydantic checks, such as 'above 0'."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found: list[str] = []
    for item in metadata:
        for part in (*getattr(item, "metadata", ()), item):
            for mark, word in words.items():
                bound = getattr(part, mark, None)
                if bound is not None and f"{word} {bound:g}" not in found:
                    found.append(f"{word} {bound:g}")
    return found


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
