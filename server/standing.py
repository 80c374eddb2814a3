"""Standing: what an operator sees of a coordinator and its runs, read from their files."""

import json
from pathlib import Path
from typing import Any

from intramural.core.canonical import digest_bytes
from intramural.core.errors import ConfigError, TrustError
from intramural.core.federation import FederationConfig
from intramural.core.journal import GENESIS, scan
from intramural.server.checkpoint import load_checkpoint
from intramural.server.commits import JOURNAL, commits_of
from intramural.server.orders import MANIFEST, NOW, Order, orders
from intramural.server.run import CHECKPOINTS, manifest_table
from intramural.server.up import STATUS, is_up
from intramural.trust.envelope import MANIFEST_TYPE, open_envelope

GATE_STATUS = Path("gate") / "status.json"
"""Where the gate writes who is connected, and what it refused."""


def read_json(path: Path) -> Any:
    """Return a status file's content; None where there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else None


def coordinator_standing(home: Path) -> dict[str, Any]:
    """Return processes, sites and runs of a coordinator, as JSON has them."""
    up = is_up(home)
    found = read_json(home / STATUS) if up else None
    return {
        "up": up,
        "processes": found["children"] if found else [],
        "gate": read_json(home / GATE_STATUS) if up else None,
        "runs": [run_standing(order) for order in orders(home)],
    }


def run_standing(order: Order) -> dict[str, Any]:
    """Return how a run stands: what is durable, what happens now, how it ended."""
    committed = commits_of(scan(order.folder / JOURNAL).entries).standing
    last = committed[-1].body if committed else None
    return {
        "name": order.name,
        "standing": order.standing,
        "rounds": federation_of(order).federation.rounds,
        "committed": last["round"] if last else 0,
        "metrics": last["metrics"] if last else {},
        "digest": last["digest"] if last else None,
        "now": read_json(order.folder / NOW) if order.standing == "wanted" else None,
        "outcome": order.outcome,
    }


def federation_of(order: Order) -> FederationConfig:
    """Return the federation that a run's signed manifest holds; its readers verify that."""
    return FederationConfig.model_validate(manifest_table(order.envelope))


def verify_run(order: Order, *, key: bytes) -> dict[str, Any]:
    """Prove what a run's folder says of itself.

    Checks the journal's chain, the manifest's signature, that the journal is of this manifest,
    that rounds are committed in order without gaps, each once unless the run fell back to an older
    checkpoint between, and that the newest checkpoint is whole and of the round that the journal
    committed last.

    Raises:
        JournalError, TrustError, CheckpointError, ConfigError: The first thing that does not hold.
    """
    payload = open_envelope(
        (order.folder / MANIFEST).read_bytes(), payload_type=MANIFEST_TYPE, key=key
    )
    entries = scan(order.folder / JOURNAL).entries
    manifests = {e.body["manifest"] for e in entries if "manifest" in e.body}
    if manifests - {digest_bytes(payload)}:
        raise TrustError(f"{order.folder}: the journal is of another manifest; restore the folder")
    commits = commits_of(entries)
    if commits.problem is not None:
        raise ConfigError(f"{order.folder}: rounds with gaps or doubles: {commits.problem}")
    for body in (entry.body for entry in entries if entry.kind == "committed"):
        if len(set(body["sites"])) != len(body["sites"]):
            raise ConfigError(f"{order.folder}: round {body['round']} counts a site twice")
    rounds = len(commits.standing)
    checkpoint, passed_over = load_checkpoint(order.folder / CHECKPOINTS)
    if checkpoint is not None and checkpoint.round not in (rounds, rounds + 1):
        raise ConfigError(
            f"{order.folder}: checkpoint of round {checkpoint.round}, journal of {rounds}"
        )
    return {
        "run": order.name,
        "entries": len(entries),
        "head": entries[-1].digest if entries else GENESIS,
        "rounds": rounds,
        "repeated": list(commits.repeated),
        "manifest": digest_bytes(payload),
        "checkpoint": checkpoint.round if checkpoint else None,
        "passed_over": passed_over,
    }
