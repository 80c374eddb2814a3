"""Plain steps kept as factors: each client gets what it gets alone, and no stack is made."""

from pathlib import Path

import numpy as np
import pytest
import torch

from intramural.core.federation import Training
from intramural.models import batched
from intramural.models.batched import train_jobs
from intramural.models.batched_factored import pays
from intramural.models.batched_fit import fit_of
from intramural.models.exchange import Exchange
from intramural.models.loading import Loaded
from intramural.models.tasks import Task
from tests.models.batched_builders import Mlp, by_hand, clients, model_of, start_of
from tests.models.test_batched import (
    SIZES,
    alone,
    assert_equal,
    check_spoilt_client,
    config_of,
    jobs_of,
)
from tests.models.test_batched_rows import Turning
from tests.tiny import LABELS, Json


@pytest.fixture
def no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the factors whether they pay or not, and fail where a stack is made."""
    monkeypatch.setattr(batched, "pays", lambda *_, **__: True)
    monkeypatch.delattr(batched, "Stack")


def some(loaded: Loaded, names: set[str]) -> Loaded:
    """Return the model with these parameters trained alone."""
    kept = {n: p.requires_grad_(n in names) for n, p in loaded.model.named_parameters()}
    exchange = Exchange({name: kept[name] for name in sorted(names)})
    return Loaded(
        model=loaded.model, tokenizer=loaded.tokenizer, exchange=exchange, device=loaded.device
    )


@pytest.mark.usefixtures("no_stack")
@pytest.mark.parametrize("kind", ["mlp", "head", "bert, lora"])
@pytest.mark.parametrize("settings", [{"local_steps": 3, "schedule": "cosine"}, {"local_steps": 1}])
def test_each_client_gets_what_it_gets_alone(bert: Path, kind: str, settings: Json) -> None:
    loaded, task = model_of(kind, bert)
    jobs = jobs_of(config_of(bert, **settings), clients(kind, task, SIZES))
    start = start_of(loaded)
    for got, job in zip(train_jobs(loaded, task, jobs, start), jobs, strict=True):
        assert_equal(got, alone(loaded, task, job, start))


@pytest.mark.usefixtures("no_stack")
@pytest.mark.parametrize("names", [{"hidden.bias", "top.weight"}, {"hidden.weight"}])
@pytest.mark.parametrize("model", [Mlp, Turning])  # of which the second takes no rows together
def test_what_is_frozen_stays(bert: Path, names: set[str], model: type[Mlp]) -> None:
    loaded, task = by_hand(model())
    loaded = some(loaded, names)
    jobs = jobs_of(config_of(bert, local_steps=3), clients("mlp", task, SIZES))
    start = start_of(loaded)
    for got, job in zip(train_jobs(loaded, task, jobs, start), jobs, strict=True):
        assert_equal(got, alone(loaded, task, job, start))


@pytest.mark.usefixtures("no_stack")
def test_a_client_whose_loss_is_not_finite_spoils_no_other(bert: Path) -> None:
    check_spoilt_client(config_of(bert, local_steps=2))


def paid(loaded: Loaded, task: Task, *, rows: int, steps: int, **settings: object) -> bool:
    training = Training.model_validate(
        {"learning_rate": 0.1, "local_steps": steps, "optimizer": "sgd"} | settings
    )
    losses = fit_of(loaded, task, training, length=6)
    tokens = clients("mlp", task, [rows])[0]
    batch, weights = losses.batch(tokens, np.arange(rows)[None]), torch.full((1, rows), 1 / rows)
    size = loaded.exchange.layout.size
    return pays(losses, training, batch, weights, steps=steps, size=size)


def test_few_plain_steps_on_few_rows_alone_are_kept_as_factors(bert: Path) -> None:
    loaded, task = model_of("mlp", bert)
    # layers of 6 x 8 and 8 x labels: what a row is multiplied with, and the model's numbers
    row, size = 6 + 8 + 8 + len(LABELS), 6 * 8 + 8 + 8 * len(LABELS)
    assert size // (2 * row) == 1
    assert paid(loaded, task, rows=1, steps=1)
    assert not paid(loaded, task, rows=1, steps=2)
    assert not paid(loaded, task, rows=2, steps=1)
    for other in (
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"gradient_clip": 1.0},
        {"optimizer": "adamw"},
    ):
        assert not paid(loaded, task, rows=1, steps=1, **other)
    bag, task = model_of("bag", bert)  # an embedding is trained, too
    assert not paid(bag, task, rows=1, steps=1)
