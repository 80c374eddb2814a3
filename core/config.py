"""Reading configuration files: TOML to frozen pydantic models, every problem reported at once."""

import difflib
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from intramural.core.errors import ConfigError


class Section(BaseModel):
    """One table of a configuration file: frozen, unknown keys refused.

    Each field's docstring is its help; error messages quote it as the remedy.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


Config = TypeVar("Config", bound=Section)


def load_config(path: Path, model: type[Config]) -> Config:
    """Read a TOML file into `model`.

    Raises:
        ConfigError: The file is missing, is not TOML, or breaks the model's rules; the message
            holds one line per problem, each naming file, key and remedy.
    """
    return check_config(read_table(path), model, source=str(path))


def read_table(path: Path) -> dict[str, Any]:
    """Read a TOML file, unchecked.

    Raises:
        ConfigError: The file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror}; check the path") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}; mend that line") from error


def check_config(table: dict[str, Any], model: type[Config], *, source: str) -> Config:
    """Validate a table that `source` held; see `load_config`."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        lines = [_line(problem, model, source) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _line(problem: ErrorDetails, model: type[BaseModel], source: str) -> str:
    """Return `file: key: what is wrong; remedy`."""
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path) or "(file)"
    parent = _model_at(model, path[:-1])
    if problem["type"] == "extra_forbidden" and parent is not None:
        near = difflib.get_close_matches(path[-1], parent.model_fields, n=1)
        known = ", ".join(parent.model_fields)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {known}"
        return f"{source}: {key}: unknown key; {remedy}"
    field = parent.model_fields.get(path[-1]) if parent is not None and path else None
    text = " ".join((field.description or "").split()) if field else ""
    if problem["type"] == "missing":
        return f"{source}: {key}: missing; add it{': ' + text if text else ''}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = problem["input"]
    got = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{source}: {key}: {message}{got}{'; it is: ' + text if text else ''}"


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """Return the section that a key path lies in, or None when it lies in no section."""
    for name in path:
        field = model.model_fields.get(name)
        if field is None:
            return None
        options = typing.get_args(field.annotation) or (field.annotation,)
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not sections:
            return None
        model = sections[0]
    return model
