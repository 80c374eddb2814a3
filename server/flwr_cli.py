"""Flower's command line, called with an environment of its own: nobody is called home."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomli_w

from intramural.core.children import QUIET
from intramural.core.errors import RoundError
from intramural.core.files import write_atomic

CONNECTION = "intramural"
CALL_S = 60.0


def flower_home(home: Path, *, address: str) -> dict[str, str]:
    """Write Flower's own configuration into `home`; return what to add to the environment.

    Args:
        home: Flower's home for this use alone.
        address: `host:port` of the SuperLink that `flwr` shall reach, on loopback.
    """
    connection = {"address": address, "insecure": True}
    table = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    write_atomic(home / "config.toml", tomli_w.dumps(table).encode())
    binaries = str(Path(sys.executable).parent)  # Flower's processes start each other by name
    path = os.pathsep.join([binaries, os.environ.get("PATH", "")])
    return {**QUIET, "RAY_USAGE_STATS_ENABLED": "0", "FLWR_HOME": str(home.resolve()), "PATH": path}


def call_flwr(env: dict[str, str], *words: str) -> dict[str, Any]:
    """Run one `flwr` command and return its JSON answer.

    Raises:
        RoundError: It failed, with its own words.
    """
    try:
        done = subprocess.run(
            ["flwr", *words, "--format", "json"],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=CALL_S,
        )
    except subprocess.TimeoutExpired:
        raise RoundError(f"flwr {words[0]}: no answer within {CALL_S:g} s") from None
    start = done.stdout.find("{")
    try:
        answer: dict[str, Any] = json.loads(done.stdout[start:])
    except ValueError:
        raise RoundError(
            f"flwr {words[0]}: {(done.stderr or done.stdout).strip()[-300:]}"
        ) from None
    if not answer.get("success", False):
        raise RoundError(f"flwr {words[0]}: {answer.get('error-message', 'failed')}")
    return answer
