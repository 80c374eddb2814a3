"""Dropout under [privacy]: its seed is secret, for one record shifts the masks of the others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intramural.client.agent import SiteAgent
from intramural.core.messages import TrainRequest
from intramural.privacy.random import SecureRandom
from tests.client.test_private_agent import SEEDED, agent, train, updated


def dropout_seeds(of: SiteAgent, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the seeds of two rounds' dropout, as training gets them."""
    seeds: list[int] = []

    def note(*arguments: Any) -> None:
        seeds.append(arguments[-1].dropout_seed)

    monkeypatch.setattr("intramural.models.private_training.train_privately", note)
    train(of, round_=1)
    train(of, round_=2)
    return seeds


def test_dropout_cannot_be_foretold(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A record drawn or not shifts the others' masks. Were the masks known, all their gradients
    # would differ between neighbours, and no clip norm would bound that.
    secret = [dropout_seeds(agent(tmp_path / x, bert), monkeypatch) for x in "ab"]
    assert len({seed for seeds in secret for seed in seeds}) == 4
    seeded = [dropout_seeds(agent(tmp_path / x, bert, policy=SEEDED), monkeypatch) for x in "cd"]
    assert seeded[0] == seeded[1]


def test_training_draws_dropout_from_its_own_seed(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delta(folder: str, dropout: float, seed: int) -> bytes:
        of = agent(
            tmp_path / folder,
            bert,
            policy=SEEDED,
            exchange={"kind": "lora", "rank": 2, "alpha": 4.0, "dropout": dropout},
        )
        monkeypatch.setattr(SecureRandom, "seed63", lambda _: seed)
        vector = np.random.default_rng(0).normal(0, 0.1, of.layout.size).astype(np.float32)
        request = TrainRequest(
            manifest=of.federation.digest, round=1, layout=of.layout.digest, vector=vector
        )
        return updated(of.answer(request)).delta.tobytes()

    assert delta("a", 0.5, 1) == delta("b", 0.5, 1) != delta("c", 0.5, 2)
    assert delta("d", 0.0, 1) == delta("e", 0.0, 2)
