"""The gate: a round that makes things worse is committed with the arrays before it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intramural.core.canonical import digest_vector
from intramural.core.errors import ConfigError
from intramural.core.messages import Evaluated, Refusal, Reply, Request
from intramural.core.metrics import LOSS_SCALE, Sums
from intramural.server.checkpoint import load_checkpoint
from tests.server.fakes import Seen, Site, coordinate, grid_of, honest, small, sums
from tests.tiny import Json

STEP = 14 / 6  # (1*1 + 2*2 + 3*3) / (1 + 2 + 3): what every round moves every parameter by


class Interrupted(Exception):
    pass


def losing(losses: dict[int, float]) -> Site:
    """Return honest sites whose loss on validation records is as given, by round."""

    def answer(site: str, request: Request) -> Reply:
        reply = honest(site, request)
        if not isinstance(reply, Evaluated) or reply.split != "validation":
            return reply
        counts = dict(sums(4).counts)
        counts["loss"] = np.array([int(4 * losses[reply.round] * LOSS_SCALE)], dtype=np.int64)
        return replace(reply, sums=Sums(counts=counts))

    return answer


def gated(rounds: int, **gate: Any) -> Any:
    return small(federation={"rounds": rounds}, gate=gate, strategy={"momentum": 0.0})


def run(folder: Path, losses: list[float], **gate: Any) -> tuple[list[bool], float]:
    """Return which rounds were rolled back, and how many steps the end lies from the start."""
    config = gated(len(losses), **gate)
    done = coordinate(folder, config, grid_of(losing(dict(enumerate(losses, start=1)))))
    rolled = [bool(record.get("rolled_back")) for record in done.outcome.history]
    return rolled, float(done.outcome.vector[0]) / STEP


def test_a_worse_round_is_undone_and_the_next_is_held_against_what_was_kept(
    tmp_path: Path,
) -> None:
    # 3.0 is worse than 2.0; 2.5 is too, though better than the round before; 1.5 is not
    rolled, steps = run(tmp_path, [2.0, 3.0, 2.5, 1.5])
    assert rolled == [False, True, True, False]
    assert steps == pytest.approx(2)


def test_what_is_within_the_tolerance_is_kept(tmp_path: Path) -> None:
    rolled, steps = run(tmp_path, [2.0, 2.25, 3.0], tolerance=0.5)
    assert rolled == [False, False, True]  # 2.25 is held against 2.0; 3.0 against 2.25
    assert steps == pytest.approx(2)


def test_the_first_round_is_always_kept(tmp_path: Path) -> None:
    assert run(tmp_path, [9.0])[0] == [False]


def test_arrays_that_no_site_can_evaluate_are_not_kept(tmp_path: Path) -> None:
    def answer(site: str, request: Request) -> Reply:
        reply = losing({1: 2.0, 2: 1.0, 3: 1.5})(site, request)
        if isinstance(reply, Evaluated) and (reply.split, reply.round) == ("validation", 2):
            return Refusal(site=site, reason="training", detail="losses are not finite")
        return reply

    done = coordinate(tmp_path, gated(3), grid_of(answer))
    assert [bool(r.get("rolled_back")) for r in done.outcome.history] == [False, True, False]
    assert done.outcome.history[1]["gate"] == {"metric": "loss", "kept": 2.0, "round": None}
    assert done.outcome.vector[0] == pytest.approx(2 * STEP)


def test_of_accuracy_more_is_better(tmp_path: Path) -> None:
    shares = {1: 2, 2: 1, 3: 3}  # right of 4

    def answer(site: str, request: Request) -> Reply:
        reply = honest(site, request)
        if not isinstance(reply, Evaluated) or reply.split != "validation":
            return reply
        counts = dict(sums(4).counts)
        right = shares[reply.round]
        counts["confusion"] = counts["confusion"].copy()
        counts["confusion"][:2] = right, 4 - right
        return replace(reply, sums=Sums(counts=counts))

    done = coordinate(tmp_path, gated(3, metric="accuracy"), grid_of(answer))
    assert [bool(r.get("rolled_back")) for r in done.outcome.history] == [False, True, False]
    assert done.outcome.history[1]["gate"] == {"metric": "accuracy", "kept": 0.5, "round": 0.25}


def test_journal_and_checkpoint_hold_the_arrays_that_were_kept(tmp_path: Path) -> None:
    done = coordinate(tmp_path, gated(2), grid_of(losing({1: 1.0, 2: 2.0})))
    committed = [e.body for e in done.journal if e.kind == "committed"]
    assert [body["digest"] for body in committed] == [digest_vector(done.outcome.vector)] * 2
    assert committed[1]["rolled_back"] is True
    checkpoint, _ = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.vector.tobytes() == done.outcome.vector.tobytes()
    assert any("rolled back" in line for line in done.seen.lines)


def test_the_rules_memory_goes_back_too_and_a_resumed_run_decides_alike(tmp_path: Path) -> None:
    config = small(federation={"rounds": 4}, gate={}, strategy={"momentum": 0.5})
    losses = losing({1: 2.0, 2: 3.0, 3: 2.5, 4: 1.0})
    whole = coordinate(tmp_path / "whole", config, grid_of(losses))

    class Stop(Seen):
        def committed(self, record: Json) -> None:
            if record["round"] == 2:
                raise Interrupted

    with pytest.raises(Interrupted):
        coordinate(tmp_path / "cut", config, grid_of(losses), watcher=Stop())
    checkpoint, _ = load_checkpoint(tmp_path / "cut" / "checkpoints")
    rest = coordinate(tmp_path / "cut", config, grid_of(losses), begin=checkpoint)
    assert rest.outcome.vector.tobytes() == whole.outcome.vector.tobytes()
    # kept: rounds 1 and 4, whose velocities are STEP and STEP / 2 + STEP
    np.testing.assert_allclose(whole.outcome.vector, 2.5 * STEP, rtol=1e-6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"gate": {}, "evaluation": {"every": 2}}, "set evaluation.every = 1"),
        ({"gate": {"metric": "perplexity"}}, r"gate\.metric can be .* not 'perplexity'"),
        (
            {
                "gate": {},
                "strategy": {"weights": "equal"},
                "site_privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3},
            },
            "set gate.judge = .coordinator.",
        ),
    ],
)
def test_a_gate_that_could_not_judge_is_refused(sections: dict[str, Json], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**sections)
