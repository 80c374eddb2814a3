"""The grid in this process: what the next node does beside the one whose message is delivered."""

import threading
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from intramural.client.agent import SiteAgent
from intramural.client.app import agent_for, prepare
from intramural.simulations import inprocess
from intramural.simulations.inprocess import InProcessGrid
from tests.client.test_rank import PRIVACY
from tests.simulations import pool_apps
from tests.simulations.test_pool import firsts, orders
from tests.tiny import federation, rows, site

NODES = (1, 2, 3, 4)


def grid(prepare: Any) -> InProcessGrid:
    return InProcessGrid(pool_apps.app, 9, run_config={}, prepare=prepare)


def test_the_next_node_is_prepared_beside_one_that_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inprocess, "AHEAD_MIN_S", 0.0)
    seen: list[tuple[int, bool]] = []
    here = threading.current_thread()

    def note(context: Context) -> None:
        seen.append((context.node_id, threading.current_thread() is here))

    one = grid(note)
    pulled = one.pull_messages(one.push_messages(orders(NODES)))
    next(iter(pulled))  # how long a delivery takes is not known before the first
    assert seen == []
    assert firsts(pulled) == [2.0, 3.0, 4.0]
    assert seen == [(3, False), (4, False)]


def test_nodes_that_are_quick_are_not_prepared() -> None:
    seen: list[int] = []
    one = grid(lambda context: seen.append(context.node_id))
    list(one.send_and_receive(orders(NODES)))
    assert seen == []


def test_a_message_waits_until_its_node_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inprocess, "AHEAD_MIN_S", 0.0)
    told: list[str] = []

    def slow(context: Context) -> None:
        threading.Event().wait(0.1)
        told.append(f"prepared {context.node_id}")

    one = grid(slow)
    for reply in one.pull_messages(one.push_messages(orders(NODES))):
        told.append(f"answered {firsts([reply])[0]:.0f}")
    assert told.index("prepared 3") < told.index("answered 3")
    assert told.index("prepared 4") < told.index("answered 4")


def test_what_goes_wrong_in_preparing_is_the_node_s_to_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inprocess, "AHEAD_MIN_S", 0.0)

    def broken(context: Context) -> None:
        raise ValueError(f"CANARY {context.node_id}")

    assert firsts(grid(broken).send_and_receive(orders(NODES))) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("is_private", [False, True])
def test_records_are_read_ahead_but_never_under_privacy(
    is_private: bool, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = federation(bert, **({"privacy": PRIVACY} if is_private else {}))
    site(tmp_path, "site-1", rows()[:40])
    read: list[str] = []
    splits = SiteAgent.splits

    def watched(agent: SiteAgent) -> Any:
        read.append(agent.name)
        return splits(agent)

    monkeypatch.setattr(SiteAgent, "splits", watched)
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": 0, "num-partitions": 1},
        state=RecordDict(),
        run_config={"manifest": config.manifest(), "simulation-sites": str(tmp_path)},
    )
    prepare(context)
    assert read == ([] if is_private else ["site-1"])
    assert set(agent_for(context)._tokens) == (set() if is_private else {"train"})
