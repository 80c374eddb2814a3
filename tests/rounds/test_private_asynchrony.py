"""[privacy] with [asynchrony]: a site is charged for what it trains, and for no round twice."""

import json
from pathlib import Path

from intramural.core.site import load_site
from intramural.privacy.plan import PrivacyPlan
from intramural.server.watcher import Watcher
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.reference.pld import pld_epsilon
from tests.rounds.test_private import DELTA, SITES, ledger_of, private, template
from tests.simulations.plays import scenario

ROUNDS = 4


def test_no_site_pays_for_a_round_twice_nor_for_more_than_the_plan(
    tmp_path: Path, bert: Path
) -> None:
    config = private(
        bert, federation={"rounds": ROUNDS}, sites={"min": 2}, asynchrony={"buffer": 1}
    )
    deal = Deal(
        federation=config,
        template=load_site(template(tmp_path)),
        sites=2,
        partition="iid",
        folder=tmp_path / "out",
    )
    scene = scenario({"slowness": 1.0}, {"slowness": 2.5}, train_s=60.0)
    report = simulate(Simulation(deal=deal, compare=frozenset(), scenario=scene), watcher=Watcher())
    charged = {name: [c.round for c in ledger_of(tmp_path, name).charges] for name in SITES}
    # 60: fast, round 1. 120: fast, 2. 150: slow, in round 3, from round 1. 180: fast, in round 4,
    # from round 3 as nobody had answered since 120
    assert sorted(charged.values(), key=len) == [[1], [1, 2, 3]]
    assert [len(record["sites"]) for record in report["rounds"]] == [1] * ROUNDS
    statements = json.loads((tmp_path / "out" / "privacy.json").read_text())
    plan = PrivacyPlan.of(config).cost()
    for name, rounds in charged.items():
        # two steps a round, each record drawn with 8 / 60
        expected = pld_epsilon((8 / 60, 1.0, 2 * len(rounds)), delta=DELTA)
        assert abs(statements[name]["epsilon_of_this_run"] / expected - 1) < 1e-4
        assert statements[name]["epsilon_of_this_run"] < plan
