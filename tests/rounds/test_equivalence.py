"""A federation of one is plain training; a federation of two is a pool, where theory says so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intramural.core.federation import FederationConfig
from intramural.core.messages import Evaluated, EvaluateRequest
from intramural.core.site import load_site
from intramural.data.records import Record
from intramural.models.base import resolve_base
from intramural.models.loading import load_model
from intramural.models.training import RoundPlan
from intramural.server.export import beginning
from intramural.server.watcher import Watcher
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.reference.plain_training import read_parameters, set_parameters, train_plainly
from tests.rounds.runs import agents, final, run
from tests.tiny import LABELS, federation, rows, site, sites


def plain_model(config: FederationConfig, base: Path) -> tuple[Any, Any]:
    """Return model and tokenizer; 'full' from transformers alone, at the federation's start."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    first = beginning(config, {})
    if config.exchange.kind == "lora":
        loaded = load_model(config, resolve_base(str(base)), device="cpu")
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        count = len(LABELS)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=count)
        tokenizer = AutoTokenizer.from_pretrained(base)
    set_parameters(model, first.layout.unflatten(first.vector))
    return model, tokenizer


def pairs(records: tuple[Record, ...]) -> list[tuple[str, int]]:
    return [(record.text, LABELS.index(record.target)) for record in records]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_site_is_plain_training(tmp_path: Path, bert: Path, kind: str) -> None:
    config = federation(
        bert,
        exchange={"kind": kind},
        federation={"rounds": 3},
        training={"local_steps": None, "local_epochs": 2, "batch_size": 16},
    )
    folder = sites(tmp_path / "sites", 1, full=kind == "full")
    run(tmp_path / "run", config, folder)
    model, tokenizer = plain_model(config, bert)
    train = pairs(agents(folder, config)[0].splits().train)
    for number in (1, 2, 3):
        plan = RoundPlan.of(config, round=number, site="site-1", micro_batch=None)
        batches = plan.batches(len(train))
        train_plainly(model, tokenizer, train, batches, learning_rate=0.1, length_max=32)
    moved = np.abs(final(tmp_path / "run") - beginning(config, {}).vector).max()
    assert moved > 0.01
    np.testing.assert_allclose(final(tmp_path / "run"), read_parameters(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_sites_with_one_full_batch_step_are_pooled_training(
    tmp_path: Path, bert: Path, kind: str
) -> None:
    config = federation(
        bert,
        exchange={"kind": kind},
        federation={"rounds": 3},
        training={"local_steps": 1, "batch_size": 1000},
        sites={"min": 2},
    )
    folder, everything = tmp_path / "sites", rows()
    full = kind == "full"
    site(folder, "site-1", everything[:60], full=full)
    site(folder, "site-2", everything[60:], full=full)
    run(tmp_path / "run", config, folder)
    train = [pair for agent in agents(folder, config) for pair in pairs(agent.splits().train)]
    model, tokenizer = plain_model(config, bert)
    whole = [list(range(len(train)))] * 3
    train_plainly(model, tokenizer, train, whole, learning_rate=0.1, length_max=32)
    np.testing.assert_allclose(final(tmp_path / "run"), read_parameters(model), rtol=0, atol=1e-6)


def test_the_metrics_of_three_sites_are_those_of_their_pooled_records(
    tmp_path: Path, bert: Path
) -> None:
    learning = {"optimizer": "adamw", "learning_rate": 0.003, "local_steps": 40}
    config = federation(bert, sites={"min": 3}, training=learning, exchange={"kind": "full"})
    folder = sites(tmp_path / "sites", 3, full=True)
    report = run(tmp_path / "run", config, folder)
    pooled = sites(tmp_path / "pooled", 1, full=True)
    [agent] = agents(pooled, config)
    request = EvaluateRequest(
        manifest=config.digest,
        round=2,
        layout=agent.layout.digest,
        split="test",
        vector=final(tmp_path / "run"),
    )
    reply = agent.answer(request)
    assert isinstance(reply, Evaluated)
    matrix = reply.sums.counts["confusion"].reshape(4, 4)
    truth, guess = (np.repeat(np.indices((4, 4))[axis].ravel(), matrix.ravel()) for axis in (0, 1))
    from sklearn.metrics import f1_score

    result = report["final"]["federated"]
    assert result["examples"] == matrix.sum()
    assert result["accuracy"] == np.trace(matrix) / matrix.sum()
    assert result["macro_f1"] == pytest.approx(
        f1_score(truth, guess, average="macro", zero_division=0), abs=1e-12
    )
    assert len(set(guess.tolist())) > 1  # else the equality says little


def test_the_same_federation_twice_ends_at_the_same_bits(tmp_path: Path, bert: Path) -> None:
    config = federation(bert, sites={"min": 3}, training={"optimizer": "adamw"})
    folder = sites(tmp_path / "sites", 3)
    one, two = (run(tmp_path / name, config, folder) for name in ("a", "b"))
    assert one["digest"] == two["digest"]
    assert one["final"] == two["final"]
    other = federation(bert, sites={"min": 3}, federation={"seed": 8})
    assert run(tmp_path / "c", other, folder)["digest"] != one["digest"]


def test_a_simulation_of_one_site_is_its_own_comparison(tmp_path: Path, bert: Path) -> None:
    # Everybody's records are the one site's: trained alone, pooled or federated, the model is one.
    config = federation(
        bert, federation={"rounds": 3}, training={"local_steps": 5, "learning_rate": 0.3}
    )
    template = load_site(site(tmp_path, "template", rows()))
    plan = Simulation(
        deal=Deal(
            federation=config, template=template, sites=1, partition="iid", folder=tmp_path / "out"
        ),
        compare=frozenset({"local", "pooled"}),
    )
    report = simulate(plan, watcher=Watcher())
    final_ = report["final"]
    federated, alone = final_["federated"], final_["local"]["site-1"]
    assert alone["accuracy"] == federated["accuracy"]
    assert alone["loss"] == pytest.approx(federated["loss"], abs=1e-6)
    before = report["initial"]["test"]
    assert abs(before["loss"] - federated["loss"]) > 1e-3
    # The pooled site has another name, and so other batches: near, and no further trained.
    assert final_["pooled"]["loss"] == pytest.approx(federated["loss"], abs=0.05)
