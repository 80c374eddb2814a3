"""The batched engine: many agents' rounds in one step, each agent's rules as ever."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from intramural.client.app import app
from intramural.core.errors import ConfigError, WireError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.core.messages import Hello, TrainRequest
from intramural.core.site import load_site
from intramural.core.wire import encode, to_letter
from intramural.server.run import RunPlan, run_federation
from intramural.server.watcher import Watcher
from intramural.simulations.batched import BatchedGrid, _Reader
from intramural.simulations.grid import Delivery
from intramural.simulations.inprocess import InProcessGrid
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.client.test_private_agent import PRIVACY
from tests.rounds.runs import final
from tests.tiny import Json, federation, generation, rows, site

NEAR = 1e-6
"""Largest difference between parameters of the two engines."""


def test_each_content_is_read_for_what_it_says() -> None:
    small, large = (Layout.of({"w": np.zeros(size, np.float32)}) for size in (1, 2))

    def content(layout: Layout, round_: int) -> RecordDict:
        vector = np.full(layout.size, round_, np.float32)
        request = TrainRequest(manifest="m", round=round_, layout=layout.digest, vector=vector)
        return encode(request)

    read, one, other = _Reader(), content(small, 1), content(large, 2)
    for expected, layout, round_ in ((one, small, 1), (other, large, 2), (one, small, 1)):
        assert read.digest(expected) == to_letter(expected).digest
        for _ in range(2):
            request = read.request(layout)
            assert (request.round, request.vector.tolist()) == (round_, [round_] * layout.size)
    with pytest.raises(WireError, match="no header"):
        read.digest(RecordDict())
    assert read.digest(one) == to_letter(one).digest
    assert read.request(small).round == 1
    with pytest.raises(WireError, match="layout"):
        read.request(large)
    read.digest(encode(Hello(manifest="m")))
    with pytest.raises(AssertionError):
        read.request(small)


def crashing(message: Message) -> None:
    """Let node 1 fail in round 1."""
    if message.metadata.message_type != "train" or message.metadata.dst_node_id != 1:
        return
    if json.loads(to_letter(message.content).header)["body"]["round"] == 1:
        raise RuntimeError("out of memory")


def carried(folder: Path, config: FederationConfig, kind: type[InProcessGrid], **how: Any) -> Json:
    """Run a federation of four sites, of which the last refuses for its few records."""
    private = config.privacy is not None
    for number in range(4):
        policy: Json = {"require_privacy": False, "records_min": 1000 if number == 3 else 1}
        policy |= {"not_private_seed": 5} if private else {}
        site(folder / "sites", f"site-{number + 1}", rows()[number::4], policy=policy)
    settings = {"manifest": config.manifest(), "simulation-sites": str(folder / "sites")}
    grid = kind(app, 4, run_config=settings, **how)
    plan = RunPlan(federation=config, folder=folder, patience_s=0.0)
    return run_federation(plan, grid)


def charges(folder: Path) -> list[Json]:
    """Return what the sites' ledgers say was charged and settled, but for chance and times."""
    entries = [
        json.loads(line)
        for file in sorted(folder.glob("sites/*/ledger*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    own = ("run_id", "ledger", "nonce")
    return [
        {"kind": e["kind"], "seq": e["seq"]}
        | {key: value for key, value in e["body"].items() if key not in own}
        for e in entries
    ]


@pytest.mark.parametrize("private", [False, True])
def test_it_ends_where_one_site_after_another_does_with_a_crash_and_a_refusal(
    tmp_path: Path, bert: Path, private: bool
) -> None:
    sections: Json = {"sites": {"min": 3, "quorum": 0.5}, "evaluation": {"every": 0}}
    if private:
        sections |= {"privacy": PRIVACY, "strategy": {"weights": "equal"}}
    config = federation(bert, **sections)
    reports = [
        carried(tmp_path / kind.__name__, config, kind, before=crashing)
        for kind in (InProcessGrid, BatchedGrid)
    ]
    one, many = (final(tmp_path / kind.__name__) for kind in (InProcessGrid, BatchedGrid))
    np.testing.assert_allclose(one, many, rtol=0, atol=NEAR)
    start = final(tmp_path / "InProcessGrid") * 0
    assert np.abs(one - start).max() > 100 * NEAR
    told = [[(r["sites"], r["refusals"]) for r in report["rounds"]] for report in reports]
    assert told[0] == told[1]
    assert "site-1" not in told[0][0][0]
    assert "site-1" in told[0][1][0]


def test_ledgers_are_charged_and_settled_as_by_one_site_after_another(
    tmp_path: Path, bert: Path
) -> None:
    config = federation(
        bert,
        sites={"min": 3, "quorum": 0.5},
        privacy=PRIVACY,
        strategy={"weights": "equal"},
    )
    for kind in (InProcessGrid, BatchedGrid):
        carried(tmp_path / kind.__name__, config, kind)
    found = [charges(tmp_path / kind.__name__) for kind in (InProcessGrid, BatchedGrid)]
    assert found[0] == found[1]
    kinds = [entry["kind"] for entry in found[0]]
    assert (kinds.count("charged"), kinds.count("settled")) == (8, 8)  # the refusing one pays too


def test_each_delivery_is_told_once_and_in_order(tmp_path: Path, bert: Path) -> None:
    seen: list[Delivery] = []
    config = federation(bert, sites={"min": 3}, evaluation={"every": 0})
    carried(tmp_path, config, BatchedGrid, observe=seen.append)
    trained = [d for d in seen if d.kind == "train"]
    assert [d.node for d in trained] == [1, 2, 3] * 2
    for earlier, later in pairwise(trained):
        assert earlier.began_s <= earlier.ended_s <= later.began_s + 1e-9


def test_what_cannot_be_batched_is_refused_by_name(tmp_path: Path, llama: Path) -> None:
    template = site(tmp_path, "template", rows(), kind="generation")
    deal = Deal(
        federation=generation(llama, sites={"min": 2}),
        template=load_site(template),
        sites=2,
        partition="iid",
        folder=tmp_path / "out",
    )
    with pytest.raises(ConfigError, match=r"--engine batched: task.kind = 'generation'"):
        simulate(Simulation(deal=deal, engine="batched"), watcher=Watcher())


def test_a_failure_of_all_jobs_is_each_site_s_refusal(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from intramural.core.errors import RoundError
    from intramural.simulations import batched

    def broken(*_: object) -> Any:
        raise MemoryError("of 17 texts")

    monkeypatch.setattr(batched, "_train", broken)
    with pytest.raises(RoundError, match="internal"):
        carried(tmp_path, federation(bert, sites={"min": 3}), BatchedGrid)
    assert "17 texts" not in (tmp_path / "journal.jsonl").read_text()
