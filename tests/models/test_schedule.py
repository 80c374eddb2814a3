"""The learning rate against closed forms."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from intramural.core.federation import Training
from intramural.models.schedule import learning_rate


def settings(schedule: str, warmup: float = 0.0) -> Training:
    return Training.model_validate(
        {"learning_rate": 2.0, "local_steps": 1, "schedule": schedule, "warmup": warmup}
    )


@pytest.mark.parametrize(
    ("schedule", "warmup", "progress", "expected"),
    [
        ("constant", 0.0, 0.0, 2.0),
        ("constant", 0.0, 1.0, 2.0),
        ("constant", 0.5, 0.25, 1.0),
        ("linear", 0.0, 0.25, 1.5),
        ("linear", 0.0, 1.0, 0.0),
        ("linear", 0.2, 0.1, 1.0),  # 2 * 0.1 / 0.2
        ("linear", 0.2, 0.2, 2.0),
        ("linear", 0.2, 0.6, 1.0),  # x = 0.4 / 0.8
        ("cosine", 0.0, 0.0, 2.0),
        ("cosine", 0.0, 0.5, 1.0),
        ("cosine", 0.0, 1 / 3, 1.5),  # 2 * (1 + cos 60 degrees) / 2
        ("cosine", 0.5, 0.75, 1.0),
        ("cosine", 0.5, 1.0, 0.0),
    ],
)
def test_closed_forms(schedule: str, warmup: float, progress: float, expected: float) -> None:
    rate = learning_rate(settings(schedule, warmup), progress)
    assert rate == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_to_the_peak_and_the_rate_never_rises_again(schedule: str) -> None:
    rates = [learning_rate(settings(schedule, 0.3), n / 100) for n in range(101)]
    assert rates[:31] == sorted(rates[:31])
    assert rates[0] == 0.0
    assert max(rates) == pytest.approx(2.0)
    assert rates[30:] == sorted(rates[30:], reverse=True)


def test_rounds_do_not_restart_the_schedule(bert: Path) -> None:
    from intramural.models import training
    from tests.models.builders import bench, chapters, plan
    from tests.tiny import federation

    settings = {"local_steps": 4, "schedule": "cosine", "warmup": 0.25, "learning_rate": 2.0}
    config = federation(bert, training=settings, federation={"rounds": 3})
    on = bench(config, chapters(8))
    seen: list[float] = []

    def watched(parameters: object, settings: object) -> Callable[[float], None]:
        return seen.append  # and no step: the rate is all that is looked at

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_step", watched)
        for number in (1, 2, 3):
            training.train_round(on.loaded, on.task, on.tokens, plan(config, round=number))
    expected = []
    for done in (n / 12 for n in range(12)):
        x = (done - 0.25) / 0.75
        expected.append(2 * done / 0.25 if done < 0.25 else 1 + math.cos(math.pi * x))
    assert seen == pytest.approx(expected)
