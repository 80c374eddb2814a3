"""Attacks of benchmarks/byzantine.py, and the rounds in which the rules meet them.

The attackers see every honest update of a round before they send theirs; the tuned ones also try
what they would send against the rule itself, with its state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.byzantine_world import HOSTILE, SITES, Choice, World
from intramural.core.layout import Vector
from intramural.core.messages import Update
from intramural.core.seeds import generator
from intramural.core.site import simulated_name
from intramural.simulations import attacks
from intramural.strategies.registry import make_rule
from intramural.strategies.rule import Rule, State

ALIE_Z = 1.5
"""byzfl's default: z by the paper's formula is 0 for 2 of 10, which is no attack."""
FREE_NOISE = 0.1
"""Noise of the free rider, as a share of the arrays' last change."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A round as the attackers see it."""

    honest: list[Vector]
    """Updates of the honest sites."""
    own: list[Vector]
    """What the hostile sites trained, on clean records or on those of the attack."""
    last_change: Vector
    """What the round before changed; zeros in the first."""
    harm: Callable[[Vector], float]
    """How far the aggregate would lie from the honest mean, did all hostile sites send this."""
    rng: np.random.Generator
    memory: dict[str, int] = field(default_factory=dict)
    """Kept over the rounds of a run."""


Craft = Callable[[Scene], list[Vector]]
"""Returns what each hostile site sends."""


def _same(make: Callable[[Scene], Vector]) -> Craft:
    """Return an attack in which all hostile sites send one update."""
    return lambda scene: [make(scene)] * HOSTILE


def _each(make: Callable[[Scene, Vector], Vector]) -> Craft:
    """Return an attack in which each hostile site changes what it trained."""
    return lambda scene: [make(scene, own) for own in scene.own]


def _mimic(scene: Scene) -> Vector:
    """Copy the site that the first round showed."""
    if "victim" not in scene.memory:
        scene.memory["victim"] = attacks.mimic_victim(scene.honest)
    return scene.honest[scene.memory["victim"]]


ATTACKS: dict[str, Craft] = {
    "none": lambda scene: scene.own,
    "sign-flip x10": _each(lambda _, own: attacks.sign_flip(own, strength=10.0)),
    "gaussian x10": _each(lambda s, own: attacks.gaussian(own, strength=10.0, rng=s.rng)),
    "ipm 0.1": _same(lambda s: attacks.ipm(s.honest, epsilon=0.1)),
    "ipm 1.1": _same(lambda s: attacks.ipm(s.honest, epsilon=1.1)),
    "ipm tuned": _same(
        lambda s: attacks.tuned(lambda e: attacks.ipm(s.honest, epsilon=e), s.harm)[0]
    ),
    "alie 1.5": _same(lambda s: attacks.alie(s.honest, z=ALIE_Z)),
    "alie tuned": _same(lambda s: attacks.tuned(lambda z: attacks.alie(s.honest, z=z), s.harm)[0]),
    "min-max": _same(lambda s: attacks.min_max(s.honest)),
    "min-sum": _same(lambda s: attacks.min_sum(s.honest)),
    "mimic": _same(_mimic),
    "free-rider": _each(lambda s, _: attacks.free_rider(s.last_change, size=FREE_NOISE, rng=s.rng)),
    "label flip": lambda scene: scene.own,
    "backdoor x1": lambda scene: scene.own,
    "backdoor": _each(lambda _, own: attacks.model_replacement(own, sites=SITES, hostile=HOSTILE)),
}
"""By the name in the table. The last two replace the model, or do not, with poisoned training."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a federation came to under an attack."""

    accuracy: float
    """On the clean test titles."""
    success: float
    """Share of the test titles of other chapters that the trigger turns into the target."""


def play(world: World, choice: Choice, attack: str) -> Outcome:
    """Run all rounds of a federation under an attack."""
    rule = make_rule(world.federation_with(choice), world.layout)
    state: State = {}
    current = world.start
    tokens = list(world.clean)
    if attack == "label flip":
        tokens[SITES - HOSTILE :] = world.flipped
    elif attack.startswith("backdoor"):
        tokens[SITES - HOSTILE :] = world.poisoned
    memory: dict[str, int] = {}
    last_change = np.zeros_like(current)
    for round in range(1, world.rounds + 1):
        trained = world.train(current, tokens, round=round)
        honest, own = trained[: SITES - HOSTILE], trained[SITES - HOSTILE :]
        scene = Scene(
            honest=honest,
            own=own,
            last_change=last_change,
            harm=harm_of(rule, state, current, honest, round=round),
            rng=generator(world.seed, "byzantine", attack, round),
            memory=memory,
        )
        sent = ATTACKS[attack](scene)
        following, state = aggregated(rule, state, current, [*honest, *sent], round=round)
        last_change, current = following - current, following
    return Outcome(
        accuracy=world.accuracy(current, "clean"), success=world.accuracy(current, "backdoor")
    )


def aggregated(
    rule: Rule, state: State, current: Vector, deltas: Sequence[Vector], *, round: int
) -> tuple[Vector, State]:
    """Return the next arrays and state, once every site's update is folded in."""
    fold = rule.begin(state, current, round=round)
    for number, delta in enumerate(deltas):
        site = simulated_name(number, len(deltas))
        update = Update(
            site=site, round=round, layout="", weight=1, loss=None, seconds=None, delta=delta
        )
        rule.add(fold, update)
    return rule.finish(fold)


def harm_of(
    rule: Rule, state: State, current: Vector, honest: list[Vector], *, round: int
) -> Callable[[Vector], float]:
    """Return what tells how far an update would move the aggregate from the honest mean."""
    wanted = current + attacks.mean_of(honest)

    def harm(sent: Vector) -> float:
        got, _ = aggregated(rule, state, current, [*honest, *[sent] * HOSTILE], round=round)
        return float(np.linalg.norm(got - wanted))

    return harm
