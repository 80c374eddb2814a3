"""Orders: what an operator wants of a run, as files in the run's folder.

`server run` writes an order; the supervisor of `server up` sees to it that a ServerApp works on
it, whatever dies in between; the ServerApp leaves an outcome when the run is over, well or badly.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from intramural.core.config import load_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.files import Held, exclusive, make_folder, write_atomic, write_json
from intramural.server.folder import CoordinatorFolder
from intramural.server.holdout import check_holdout
from intramural.server.planning import check_federation
from intramural.server.run import LOCK
from intramural.trust.envelope import MANIFEST_TYPE, sign
from intramural.trust.keys import read_signing_key

RUNS, ORDER, OUTCOME, NOW, MANIFEST, FEDERATION = (
    "runs",
    "order.json",
    "outcome.json",
    "now.json",
    "manifest.json",
    "federation.toml",
)

Standing = Literal["wanted", "stopped", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """One run of a coordinator, as its folder tells."""

    folder: Path

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.folder.name

    @property
    def envelope(self) -> str:
        """The signed manifest, as it is sent."""
        return (self.folder / MANIFEST).read_text()

    @property
    def places(self) -> dict[str, str]:
        """Folders of base models by name, at the coordinator."""
        places: dict[str, str] = self._order["models"]
        return places

    @property
    def holdout(self) -> str:
        """The holdout.toml that [gate] judges by; empty: none."""
        path: str = self._order.get("holdout", "")
        return path

    @property
    def standing(self) -> Standing:
        """How the run stands."""
        outcome = self.outcome
        if outcome is not None:
            return "finished" if outcome["error"] is None else "failed"
        return "wanted" if self._order["wanted"] else "stopped"

    @property
    def _order(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / ORDER).read_text())
        return content

    @property
    def outcome(self) -> dict[str, Any] | None:
        """How the run ended; None: it has not."""
        path = self.folder / OUTCOME
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def is_worked_on(self) -> bool:
        """Whether a ServerApp holds the run at this moment."""
        try:
            with exclusive(self.folder / LOCK):
                return False
        except Held:
            return True

    def want(self, *, wanted: bool) -> None:
        """Ask for the run to go on, or to stop after what it has committed."""
        write_json(self.folder / ORDER, self._order | {"wanted": wanted})
        if wanted:
            (self.folder / OUTCOME).unlink(missing_ok=True)

    def end(self, *, error: str | None, exit_code: int) -> None:
        """Note that the run is over."""
        write_json(self.folder / OUTCOME, {"error": error, "exit_code": exit_code})


def place_order(
    home: Path,
    federation_file: Path,
    *,
    name: str | None,
    models: dict[str, str],
    holdout: Path | None = None,
    passphrase: str | None,
) -> Order:
    """Write the order of a new run, with its signed manifest.

    Args:
        home: The coordinator's folder.
        federation_file: A federation.toml.
        name: The run's name; None: the federation's, with a number.
        models: Folders of base models by name.
        holdout: holdout.toml of the coordinator's own records, where [gate] judges by them.
        passphrase: Of the signing key.

    Raises:
        ConfigError: The federation is wrong, or there is such a run already.
        TrustError: The signing key cannot be read.
    """
    federation = load_config(federation_file, FederationConfig)
    check_federation(federation)
    check_holdout(federation, holdout)
    folder = home / RUNS / (name or _free_name(home, federation.federation.name))
    if folder.exists():
        raise ConfigError(f"{folder}: there is such a run; name another, or `server run --resume`")
    key = read_signing_key(CoordinatorFolder(root=home).signing_key, passphrase=passphrase)
    beside = federation_file.parent / federation.model.base
    places = {federation.model.base: str(beside.resolve())} if beside.is_dir() else {}
    make_folder(folder)
    write_atomic(folder / FEDERATION, federation_file.read_bytes())
    write_json(folder / MANIFEST, sign(MANIFEST_TYPE, federation.manifest().encode(), key))
    order = {"wanted": True, "models": places | models}
    if holdout is not None:
        order["holdout"] = str(holdout.resolve())
    write_json(folder / ORDER, order)  # last: it counts
    return Order(folder=folder)


def _free_name(home: Path, stem: str) -> str:
    number = 1
    while (home / RUNS / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def orders(home: Path) -> list[Order]:
    """Return a coordinator's runs, by name."""
    found = sorted((home / RUNS).glob(f"*/{ORDER}"))
    return [Order(folder=path.parent) for path in found]


def order_named(home: Path, name: str) -> Order:
    """Return one run.

    Raises:
        ConfigError: There is none of this name; those that are there are named.
    """
    for order in orders(home):
        if order.name == name:
            return order
    known = ", ".join(order.name for order in orders(home)) or "none"
    raise ConfigError(f"{home}: no run {name!r}; there are: {known}")
