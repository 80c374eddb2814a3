"""`make chaos`: every fault on a real deployment; exit code 1 if one run ends otherwise.

python -m tests.chaos [--only WORDS] [--json FILE] [--keep FOLDER]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.chaos.faults import Fault, faults
from tests.chaos.stage import Stage, stage
from tests.tiny_models import save_bert


def main() -> int:
    """Run the faults one after the other, each on a run of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is brought down
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name holds these words")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--keep", type=Path, help="folder to keep everything in")
    options = parser.parse_args()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    disks = _can_mount()
    chosen = [fault for fault in faults() if options.only in fault.name]
    console = Console()
    if not disks:
        console.print("full disks are not tried: mounting one needs root")
        chosen = [fault for fault in chosen if not fault.needs_disks]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        base = save_bert(folder / "base")
        with stage(folder, base, disks=disks) as one:
            rows = [_calm(one, console)]
            rows += [_disturbed(one, fault, number, console) for number, fault in enumerate(chosen)]
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    bad = [row for row in rows if not row["ok"]]
    console.print(f"{len(rows) - len(bad)} passed, {len(bad)} failed")
    return 1 if bad else 0


def _calm(one: Stage, console: Console) -> dict[str, Any]:
    return _row("undisturbed", one, time.monotonic(), console)


def _disturbed(one: Stage, fault: Fault, number: int, console: Console) -> dict[str, Any]:
    began = time.monotonic()
    one.begin(f"fault-{number}")
    fault.disturb(one)
    return _row(fault.name, one, began, console)


def _row(name: str, one: Stage, began: float, console: Console) -> dict[str, Any]:
    try:
        found = one.finish()
    except Exception as error:  # noqa: BLE001 (the next fault is still to be tried)
        found = {"outcome": f"{type(error).__name__}: {error}", "digest": None, "verified": False}
    same = found["digest"] == one.expected
    ok = found["outcome"] is None and same and bool(found["verified"])
    row = {"name": name, "ok": ok, "same_digest": same, "seconds": time.monotonic() - began} | found
    console.print(
        f"{'ok  ' if ok else 'FAIL'} {row['seconds']:6.1f} s  {name}{'' if ok else f'  {found}'}",
        highlight=False,
    )
    return row


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as place:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
        try:
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return False
        except OSError:
            return False
        subprocess.run(["umount", place], check=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
