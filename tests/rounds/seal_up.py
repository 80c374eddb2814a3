"""`server up` and `client up`, each with lines that lead through ports which a test listens at.

`python -m tests.rounds.seal_up PLACE LINES`: PLACE is a coordinator's folder or a site.toml, LINES
a JSON object. All else is the product's: the same supervisor starts the same processes.
"""

import json
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from intramural.client import up as client_up
from intramural.client.worker import address_of, socket_file
from intramural.core.children import Child
from intramural.server import up as server_up

LOOPBACK = "127.0.0.1"


def _led(child: Child, words: Mapping[str, str]) -> Child:
    return replace(child, command=[words.get(word, word) for word in child.command])


def coordinator_through(folder: Path, lines: Mapping[str, Any], stop: threading.Event) -> None:
    """Have SuperLink listen at `superlink`; the port of coordinator.toml is the test's."""
    children = server_up._children

    def led(*told: Any) -> list[Child]:
        port = str(told[1].superlink_port)
        gate_or_link = {"superlink": {port: str(lines["superlink"])}}
        return [_led(child, gate_or_link.get(child.name, {})) for child in children(*told)]

    server_up._children = led  # type: ignore[assignment]
    server_up.coordinator_up(folder, stop=stop)


def site_through(site_file: Path, lines: Mapping[str, Any], stop: threading.Event) -> None:
    """Have the gate listen at `gate`, and SuperNode dial `node` for it and `worker` for the worker.

    `module` stands for the worker's own, when there is one.
    """
    children, ports = client_up._children, [lines["gate"], lines["runtime"]]
    free_port: Callable[[], int] = lambda: ports.pop(0)  # noqa: E731

    def led(site: Path) -> list[Child]:
        address = address_of(socket_file(site))
        node = {
            f"{LOOPBACK}:{lines['gate']}": f"{LOOPBACK}:{lines['node']}",
            f'worker="{address}"': f'worker="{lines.get("worker", address)}"',
        }
        own = "intramural.client.worker"
        words = {"supernode": node, "worker": {own: lines.get("module", own)}}
        return [_led(child, words.get(child.name, {})) for child in children(site)]

    client_up._free_port = free_port
    client_up._children = led  # type: ignore[assignment]
    client_up.site_up(site_file, stop=stop)


def main() -> None:
    """Keep a coordinator or a site up until told to stop."""
    place, lines = Path(sys.argv[1]), json.loads(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))  # who holds records must lower it
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    (site_through if place.is_file() else coordinator_through)(place, lines, stop)


if __name__ == "__main__":
    main()
