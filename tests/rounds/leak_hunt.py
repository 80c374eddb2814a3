"""Hunt: a deployment whose first site holds canaries, and a search of all that it leaves behind."""

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from intramural.server.orders import Order
from intramural.simulations.loopback import Loopback
from tests.rounds.leak_canaries import Canaries, Hit, files_below, new_canaries
from tests.rounds.leak_worker import FAULTS
from tests.rounds.seal_census import processes
from tests.rounds.seal_net import Tapped
from tests.tiny import Row, rows, site, table

SITES, FIRST = ("site-1", "site-2"), "site-1"
RECORDS, CANARIES, SPOILT = 100, 200, 4
LOOK_S = 0.1
LOOKS = 20
"""At files, for one at processes."""
WORKER = "tests.rounds.leak_worker"
Json = dict[str, Any]


@dataclass
class Hunt:
    """A deployment in a folder, and what was found there while it was up."""

    folder: Path
    canaries: Canaries
    net: Tapped
    hits: list[Hit] = field(default_factory=list)
    """Of files that were there for a moment, and of processes' own words."""
    searched: dict[Path, int] = field(default_factory=dict)
    """Files of the last search, with their sizes in bytes."""
    passing: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """Temporary files that were looked at, with size and time; some may be gone."""

    @property
    def temporary(self) -> tuple[Path, Path]:
        """What TMPDIR and HOME are to every process of the deployment."""
        return self.folder / "tmp", self.folder / "home"

    @property
    def records(self) -> Path:
        """The canaries' own file."""
        return self.net.site_file(FIRST).parent / "records.jsonl"

    def search(self) -> list[Hit]:
        """Search every file of the deployment but the records: both ends, and what passed."""
        found, self.searched = list(self.hits), {}
        for path in files_below(self.folder, but=[self.records]):
            self.searched[path] = path.stat().st_size
            found += self.canaries.search_file(path)
        return found

    def look_at_files(self) -> None:
        """Search what is temporary and new."""
        for folder in self.temporary:
            for path in files_below(folder):
                with contextlib.suppress(OSError):  # it is gone again
                    status = path.stat()
                    state = (status.st_size, status.st_mtime_ns)
                    if self.passing.get(path) != state:
                        self.passing[path] = state
                        self.hits += self.canaries.search_file(path)

    def look_at_processes(self) -> None:
        """Search the arguments and the environment of each process."""
        for who in list(self.net.running):
            with contextlib.suppress(psutil.Error):
                for process in processes(self.net, who):
                    words = repr((process.cmdline(), process.environ()))
                    self.hits += self.canaries.search(words.encode(), where=process.name())

    def run(self, bert: Path, *, name: str, **sections: Json) -> Order:
        """Order a run that both sites have approved."""
        told: Json = {"federation": {"name": name, "rounds": 1}, "sites": {"min": 2}} | sections
        file = self.net.folder / f"{name}.toml"
        file.write_text(tomli_w.dumps(table(bert, **told)))
        return self.net.run(file, name=name)

    def fault(self, *words: str) -> None:
        """Have the first site's worker go wrong, once for each word."""
        (self.records.parent / FAULTS).write_text("\n".join(words))


@contextmanager
def hunting(folder: Path, bert: Path) -> Iterator[Hunt]:
    """Have a deployment up whose first site's texts and persons are canaries."""
    from transformers import AutoTokenizer  # here: it imports torch, which takes seconds

    canaries = new_canaries(CANARIES, AutoTokenizer.from_pretrained(bert))
    net = Tapped(folder=folder / "net", sites=SITES)
    hunt = Hunt(folder=folder, canaries=canaries, net=net)
    for one in hunt.temporary:
        one.mkdir(parents=True)
    tmp, home = map(str, hunt.temporary)
    net.environment = {"OMP_NUM_THREADS": "1", "TMPDIR": tmp, "HOME": home, "XDG_CACHE_HOME": home}
    write_sites(net.folder, canaries)
    Loopback.found(net, name="tiny")
    with net.lined(folder / "captures"):
        net.lines[FIRST]["module"] = WORKER
        with net.up(), looking(hunt):
            net.await_nodes()
            yield hunt


@contextmanager
def looking(hunt: Hunt) -> Iterator[None]:
    """Look again and again within the block."""
    stop = threading.Event()

    def go_on() -> None:
        for number in itertools.count():
            hunt.look_at_files()
            if number % LOOKS == 0:
                hunt.look_at_processes()
            if stop.wait(LOOK_S):
                return

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def write_sites(folder: Path, canaries: Canaries) -> None:
    """Write the first site with a canary in each text and in each person, and the second without.

    Some rows of the first cannot be used; what is wrong in them is a canary, or stands beside one.
    """
    told: Json = {"data": {"person": "patient"}, "policy": {"epsilon_run": 1000.0}}
    told["policy"] |= {"require_privacy": False, "exchange": ["lora"]}
    parts = rows()[:RECORDS], rows()[RECORDS:]
    texts, persons = canaries.words[:RECORDS], canaries.words[RECORDS:]
    marked = [
        row | {"title": f"{text} {row['title']}", "patient": person}
        for row, text, person in zip(parts[0], texts, persons, strict=True)
    ]
    plain: list[Row] = [row | {"patient": f"p{n}"} for n, row in enumerate(parts[1])]
    for name, records in zip(SITES, (marked, plain), strict=True):
        site(folder, name, records, **told)
    with open(folder / FIRST / "records.jsonl", "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in spoilt(marked, canaries.stem))


def spoilt(records: list[Row], word: str) -> list[str]:
    """Return lines that are no records, each for another reason."""
    first = records[0]
    lines = [
        json.dumps(first | {"chapter": word}),
        json.dumps(first | {"title": [word]}),
        json.dumps(first | {"patient": None}),
        json.dumps(first)[:-20],  # ends in the middle of a text
    ]
    assert len(lines) == SPOILT
    return lines
