"""Children: started in order, started again when they die, ended with all they started."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intramural.core.children import Child, Children

FOREVER = "import time; time.sleep(60)"


def child(name: str, script: str = FOREVER, **rest: Any) -> Child:
    return Child(name=name, command=[sys.executable, "-c", script], **rest)


def kept(folder: Path, *children: Child) -> Children:
    return Children(children, logs=folder / "logs", status=folder / "children.json")


def status(folder: Path) -> dict[str, dict[str, object]]:
    rows = json.loads((folder / "children.json").read_text())["children"]
    return {row["name"]: row for row in rows}


def tended(
    children: Children, *, until: Callable[[], bool] | None = None, seconds: float = 10.0
) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done = children.tend()
        if done if until is None else until():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_child_starts_once_the_one_before_is_ready(tmp_path: Path) -> None:
    mark = tmp_path / "ready"
    first, second = child("first", ready=mark.exists), child("second")
    with kept(tmp_path, first, second) as children:
        assert not children.tend()
        assert status(tmp_path)["second"]["pid"] is None
        mark.touch()
        assert tended(children)
        assert status(tmp_path)["second"]["pid"] is not None


def test_a_killed_child_is_started_again_under_another_number(tmp_path: Path) -> None:
    with kept(tmp_path, child("one")) as children:
        assert tended(children)
        first = int(str(status(tmp_path)["one"]["pid"]))
        os.kill(first, signal.SIGKILL)
        assert tended(children, until=lambda: status(tmp_path)["one"]["pid"] not in (None, first))
        row = status(tmp_path)["one"]
        assert (row["deaths"], row["last_exit"]) == (1, -signal.SIGKILL)


POLITE = """
import pathlib, signal, sys, time
def leave(*_):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[2]).touch()
time.sleep(60)
"""


def test_a_file_asks_for_a_new_start_and_the_old_process_may_say_goodbye(tmp_path: Path) -> None:
    asked, goodbye, up = (tmp_path / name for name in ("restart", "goodbye", "up"))
    asked.touch()  # from before: the first start is new enough
    command = [sys.executable, "-c", POLITE, str(goodbye), str(up)]
    with kept(tmp_path, Child(name="one", command=command, restart=asked)) as children:
        assert tended(children, until=up.exists)
        assert not asked.exists()
        first = children.pid("one")
        asked.touch()
        assert tended(children, until=lambda: children.pid("one") not in (None, first))
        assert goodbye.exists()
        assert not asked.exists()
        assert status(tmp_path)["one"]["last_exit"] == 0


def test_a_child_that_will_not_go_to_be_started_anew_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intramural.core.children.STOP_S", 0.2)
    asked, up = tmp_path / "restart", tmp_path / "up"
    deaf = "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    script = f"{deaf}; pathlib.Path({str(up)!r}).touch(); time.sleep(60)"
    with kept(tmp_path, child("one", script, restart=asked)) as children:
        assert tended(children, until=up.exists)
        first = children.pid("one")
        asked.touch()
        assert tended(children, until=lambda: children.pid("one") not in (None, first))
        assert status(tmp_path)["one"]["last_exit"] == -signal.SIGKILL


def test_a_child_that_dies_at_once_waits_longer_each_time(tmp_path: Path) -> None:
    now = [0.0]
    children = Children(
        [child("bad", "raise SystemExit(3)")],
        logs=tmp_path / "logs",
        status=tmp_path / "children.json",
        clock=lambda: now[0],
    )
    starts = []
    with children:
        for _ in range(40):
            children.tend()
            running = children._running.get("bad")
            if running is not None:
                starts.append(now[0])
                running.process.wait()
            now[0] += 0.5
    # dead at 0, 0.5 later again, then 1, 2, 5 and 15 s after each death (noticed 0.5 s later)
    assert starts == [0.0, 1.0, 2.5, 5.0, 10.5]


def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, pathlib, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {FOREVER!r}])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid))\n"
        "time.sleep(60)"
    )
    wrote = (tmp_path / "pid").exists
    with kept(tmp_path, child("parent", script, ready=wrote)) as children:
        assert tended(children)
        time.sleep(0.1)
        grandchild = int((tmp_path / "pid").read_text())
        assert alive(grandchild)
    time.sleep(0.1)
    assert not alive(grandchild)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from intramural.core.children import Child, Children\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"one = Child(name='one', command=[sys.executable, '-c', {FOREVER!r}])\n"
        "with Children([one], logs=folder / 'logs', status=folder / 'children.json') as c:\n"
        "    while True:\n        c.tend(); time.sleep(0.05)\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 20
    while not (tmp_path / "children.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(str(status(tmp_path)["one"]["pid"]))
    assert alive(pid)
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_child_that_is_never_ready_is_started_again(tmp_path: Path) -> None:
    slow = child("slow", ready=lambda: False, ready_s=0.2)

    def died_twice() -> bool:
        return status(tmp_path)["slow"]["deaths"] == 2

    with kept(tmp_path, slow) as children:
        children.tend()
        assert tended(children, until=died_twice)


def test_what_a_child_says_is_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "talker.log"
    with kept(tmp_path, child("talker", "print('hello')")) as children:
        assert tended(children, until=lambda: log.exists() and log.read_text() == "hello\n")
