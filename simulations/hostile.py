"""Hostile: what a simulated attacker makes of an honest update, in the letter that carries it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

import numpy as np
from flwr.app import Message

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.core.wire import to_letter, to_records
from intramural.simulations import attacks
from intramural.simulations.scenario import COLLUSIVE, Attack, Scenario


def check_attacks(scenario: Scenario, federation: FederationConfig) -> None:
    """Refuse attacks that a federation's rounds leave without a meaning.

    With [asynchrony] the honest updates that started from one round's arrays come over several, and
    some after others have counted: what an attack is made of would hang on who was asked when, and
    a resumed run would not know the half of it.

    Raises:
        ConfigError: A group's sites attack together, and rounds do not wait for their cohort.
    """
    together = [group for group in scenario.groups if group.hostile in COLLUSIVE]
    if together and federation.asynchrony is not None:
        raise ConfigError(
            f"scenario {scenario.name}: group {together[0].name!r} attacks by "
            f"{together[0].hostile!r}, of all its sites' updates of a round, and with [asynchrony] "
            "these do not come together; remove the table, or let each site attack by itself"
        )


def honest_update(reply: Message) -> Vector | None:
    """Return a copy of the update in a reply, float32; None where it carries none."""
    if reply.has_error():
        return None
    letter = to_letter(reply.content)
    return None if letter.vector is None else np.frombuffer(letter.vector, dtype="<f4").copy()


def spoil(
    reply: Message,
    attack: Attack,
    *,
    strength: float,
    rng: np.random.Generator,
    known: Sequence[Vector] = (),
) -> bool:
    """Put a hostile update in an honest one's place; False: the reply carries none.

    A simulation's letters have no seals, so a changed one is as good as the site's own.
    """
    honest = honest_update(reply)
    if honest is None:
        return False
    letter = to_letter(reply.content)
    spoilt = attacked(honest, attack, strength=strength, rng=rng, known=known)
    reply.content = to_records(replace(letter, vector=spoilt.tobytes()))
    return True


def attacked(
    delta: Vector,
    attack: Attack,
    *,
    strength: float,
    rng: np.random.Generator,
    known: Sequence[Vector] = (),
) -> Vector:
    """Return a hostile update, float32, shape as `delta`.

    'sign-flip' is the update times -strength, 'scale' times strength. 'noise' is Gaussian with
    `strength` times the update's root mean square as its deviation; 'constant' is that number
    everywhere. 'free-rider' is zeros, 'nan' and 'inf' are these everywhere.

    Those of `COLLUSIVE` are made of `known`, the group's honest updates, of which `delta` is one:
    see `attacks`. `strength` is z of 'alie', epsilon of 'ipm', and the share of the largest
    deviation of 'min-max' and 'min-sum'. 'mimic' has all send one of the group's updates, chosen
    anew each round, where the paper keeps to one site.
    """
    rows = list(known) or [delta]
    match attack:
        case "sign-flip":
            found = attacks.sign_flip(delta, strength=strength)
        case "scale":
            found = delta * np.float32(strength)
        case "noise":
            found = attacks.gaussian(delta, strength=strength, rng=rng)
        case "constant":
            found = attacks.constant(delta, strength=strength)
        case "free-rider":
            found = np.zeros_like(delta)
        case "nan":
            found = np.full_like(delta, np.nan)
        case "inf":
            found = np.full_like(delta, np.inf)
        case "alie":
            found = attacks.alie(rows, z=strength)
        case "ipm":
            found = attacks.ipm(rows, epsilon=strength)
        case "min-max":
            found = attacks.min_max(rows, share=strength)
        case "min-sum":
            found = attacks.min_sum(rows, share=strength)
        case "mimic":
            found = rows[attacks.mimic_victim(rows)]
        case _:
            assert_never(attack)
    return found.astype("<f4", copy=False)
