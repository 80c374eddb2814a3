"""Whole federations on the pool: the same bits as in one process."""

from pathlib import Path

from intramural.server.run import RunPlan, run_federation
from intramural.simulations.grid import Delivery
from intramural.simulations.pool import PoolGrid
from tests.rounds.runs import final, run
from tests.tiny import federation, sites


def test_two_workers_end_at_the_same_bits_as_one_process(tmp_path: Path, bert: Path) -> None:
    config = federation(bert, sites={"min": 3}, training={"optimizer": "adamw"})
    folder = sites(tmp_path / "sites", 3)
    alone = run(tmp_path / "alone", config, folder)
    settings = {"manifest": config.manifest(), "simulation-sites": str(folder)}
    seen: list[Delivery] = []
    with PoolGrid(3, run_config=settings, workers=2, observe=seen.append) as grid:
        plan = RunPlan(federation=config, folder=tmp_path / "pool", patience_s=0.0)
        pooled = run_federation(plan, grid)
    assert pooled["digest"] == alone["digest"]
    assert pooled["final"] == alone["final"]
    assert (final(tmp_path / "pool") == final(tmp_path / "alone")).all()
    trained = [delivery for delivery in seen if delivery.kind == "train"]
    assert [d.node for d in trained] == [1, 2, 3] * 2  # in the order of the sites
    assert {d.worker for d in trained} == {0, 1}
    assert not any(d.failed for d in seen)
