"""A federation without models: sites are plain functions that answer core messages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from intramural.core.federation import FederationConfig
from intramural.core.journal import Entry, Journal
from intramural.core.layout import Layout
from intramural.core.letter import read_request
from intramural.core.messages import Evaluated, Hello, Reply, Request, TrainRequest, Update, Welcome
from intramural.core.metrics import LOSS_SCALE, Sums
from intramural.core.wire import encode, to_letter
from intramural.server.checkpoint import Checkpoint
from intramural.server.coordinator import Coordinator
from intramural.server.post import Post
from intramural.server.setting import Outcome, Setting
from intramural.server.watcher import Watcher
from intramural.simulations.inprocess import InProcessGrid
from intramural.strategies.registry import make_rule
from tests.tiny import LABELS, Json, federation

LAYOUT = Layout((("weight", (2, 3)), ("bias", (1,))))
BASE = "sha256:" + "b" * 64

Site = Callable[[str, Request], Reply]
"""Answers a request as the site of that name."""
Fault = Callable[[Any], Reply]
"""Makes another reply of a good one, or raises."""


def honest(site: str, request: Request) -> Reply:
    """Answer as a good site: site-N moves every parameter by N, from N records."""
    number = int(site.rpartition("-")[2])
    if isinstance(request, Hello):
        return Welcome(site=site, layout=LAYOUT.digest, base=BASE, version="0")
    if isinstance(request, TrainRequest):
        return Update(
            site=site,
            round=request.round,
            layout=request.layout,
            weight=number,
            loss=float(number),
            seconds=0.1,
            delta=np.full(LAYOUT.size, number, dtype=np.float32),
        )
    return Evaluated(site=site, round=request.round, split=request.split, sums=sums(number))


def sums(examples: int) -> Sums:
    """Return sums of so many examples, all of the first label, half of them found."""
    confusion = np.zeros(len(LABELS) ** 2, dtype=np.int64)
    confusion[0], confusion[1] = examples // 2, examples - examples // 2
    counts = {"confusion": confusion, "loss": [examples * LOSS_SCALE], "examples": [examples]}
    return Sums(counts={name: np.array(count, dtype=np.int64) for name, count in counts.items()})


def faulty(faults: dict[str, Fault], *, kind: type = Update) -> Site:
    """Return honest sites, of which some spoil their replies of one kind."""

    def answer(site: str, request: Request) -> Reply:
        reply = honest(site, request)
        if site in faults and isinstance(reply, kind):
            return faults[site](reply)
        return reply

    return answer


def app_of(answer: Site) -> ClientApp:
    """Return a ClientApp that reads and writes the wire, and asks `answer` for the rest."""
    app = ClientApp()

    def respond(message: Message, context: Context) -> Message:
        site = f"site-{int(context.node_config['partition-id']) + 1}"
        letter = to_letter(message.content)
        reply = answer(site, read_request(letter, layout=LAYOUT))
        return Message(encode(reply, answers=letter.digest), reply_to=message)

    for register in (app.train(), app.evaluate(), app.query()):
        register(respond)
    return app


class SlowGrid(InProcessGrid):
    """Keeps the training replies of some nodes back; ticks its own clock at every look."""

    def __init__(self, *args: Any, slow: dict[int, int], silent: Iterable[int] = (), **rest: Any):
        """`slow` maps a node to the looks it needs for a training reply; `silent` never answer."""
        super().__init__(*args, **rest)
        self.slow, self.silent = slow, set(silent)
        self.now_s = 0.0
        self.connected = set(range(1, self._nodes + 1))
        self._looks: dict[str, int] = {}

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.connected)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.now_s += 1.0
        for message_id in message_ids:
            message = self._queue.get(message_id)
            if message is None or message.metadata.dst_node_id in self.silent:
                continue
            self._looks[message_id] = self._looks.get(message_id, 0) + 1
            waits = message.metadata.message_type.startswith("train")
            if waits and self._looks[message_id] < self.slow.get(message.metadata.dst_node_id, 1):
                continue
            yield from super().pull_messages([message_id])


@dataclass
class Seen(Watcher):
    """Keeps what it was told."""

    lines: list[str] = field(default_factory=list)
    records: list[Json] = field(default_factory=list)

    def waiting(self, reason: str) -> None:
        self.lines.append(reason)

    def noticed(self, line: str) -> None:
        self.lines.append(line)

    def committed(self, record: Json) -> None:
        self.records.append(record)


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a run left."""

    outcome: Outcome
    journal: list[Entry]
    seen: Seen


def small(**sections: Json) -> FederationConfig:
    """Return a federation of two rounds that three sites must take part in."""
    content: dict[str, Json] = {"sites": {"min": 3}}
    for name, keys in sections.items():
        content[name] = content.get(name, {}) | keys
    return federation(Path("no-such-base"), **content)


def start(config: FederationConfig) -> Checkpoint:
    """Return the checkpoint before the first round: all zeros."""
    return Checkpoint(
        round=0,
        manifest=config.digest,
        layout=LAYOUT.digest,
        vector=np.zeros(LAYOUT.size, dtype=np.float32),
        state={},
        history=[],
    )


def coordinate(
    folder: Path,
    config: FederationConfig,
    grid: Grid,
    *,
    begin: Checkpoint | None = None,
    **changes: Any,
) -> Done:
    """Run a coordinator over a grid to its end."""
    journal, seen = Journal(folder / "journal.jsonl"), Seen()
    setting = Setting(
        federation=config,
        layout=LAYOUT,
        base=BASE,
        rule=changes.pop("rule", None) or make_rule(config, LAYOUT),
        post=Post(grid, lambda _: LAYOUT),
        journal=journal,
        checkpoints=folder / "checkpoints",
        watcher=seen,
        sleep=lambda _: None,
        patience_s=0.0,
    )
    try:
        outcome = Coordinator(replace(setting, **changes), begin or start(config)).run()
    finally:
        journal.close()
    return Done(outcome=outcome, journal=journal.entries, seen=seen)


def grid_of(answer: Site, nodes: int = 3) -> InProcessGrid:
    """Return an in-process grid of so many nodes."""
    return InProcessGrid(app_of(answer), nodes, run_config={})
