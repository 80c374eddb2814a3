"""Census: where the processes of a deployment listen, and whom they speak to."""

import contextlib
from collections.abc import Iterator

import psutil

from intramural.simulations.loopback import Loopback

Place = tuple[str, str]
"""Of what kind ('inet', 'unix'), and where ('127.0.0.1:8443', or a path)."""


def processes(net: Loopback, who: str) -> Iterator[psutil.Process]:
    """Yield the processes of the coordinator or of a site: its supervisor and all below it."""
    supervisor = psutil.Process(net.running[who].pid)
    yield supervisor
    yield from supervisor.children(recursive=True)


def listening(net: Loopback, who: str) -> set[Place]:
    """Return where somebody's processes take connections or datagrams now."""
    found: set[Place] = set()
    for process in processes(net, who):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            for one in process.net_connections(kind="inet"):
                is_udp = one.status == psutil.CONN_NONE
                if one.status == psutil.CONN_LISTEN or (is_udp and not one.raddr):
                    found.add(("inet", f"{one.laddr.ip}:{one.laddr.port}"))
            for one in process.net_connections(kind="unix"):
                if one.laddr:
                    found.add(("unix", str(one.laddr)))
    return found


def spoken_to(net: Loopback, who: str) -> set[str]:
    """Return the addresses that somebody's processes have connections to now, as `ip:port`.

    Of a connection that was taken, the other end is not told: it is the one that dialled.
    """
    taken = {place for kind, place in listening(net, who) if kind == "inet"}
    found: set[str] = set()
    for process in processes(net, who):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            for one in process.net_connections(kind="inet"):
                own = f"{one.laddr.ip}:{one.laddr.port}"
                if one.raddr and own not in taken:
                    found.add(f"{one.raddr.ip}:{one.raddr.port}")
    return found
