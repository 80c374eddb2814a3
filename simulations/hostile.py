"""Hostile: what a simulated attacker makes of an honest update, in the letter that carries it."""

from dataclasses import replace
from typing import assert_never

import numpy as np
from flwr.app import Message

from intramural.core.layout import Vector
from intramural.core.wire import to_letter, to_records
from intramural.simulations.scenario import Attack


def spoil(reply: Message, attack: Attack, *, strength: float, rng: np.random.Generator) -> bool:
    """Put a hostile update in an honest one's place; False: the reply carries none.

    A simulation's letters have no seals, so a changed one is as good as the site's own.
    """
    if reply.has_error():
        return False
    letter = to_letter(reply.content)
    if letter.vector is None:
        return False
    honest = np.frombuffer(letter.vector, dtype="<f4")
    spoilt = attacked(honest, attack, strength=strength, rng=rng)
    reply.content = to_records(replace(letter, vector=spoilt.tobytes()))
    return True


def attacked(delta: Vector, attack: Attack, *, strength: float, rng: np.random.Generator) -> Vector:
    """Return a hostile update, float32, shape as `delta`.

    'sign-flip' is the update times -strength, 'scale' times strength. 'noise' is Gaussian with
    `strength` times the update's root mean square as its deviation; 'constant' is that number
    everywhere.
    """
    squares = np.square(delta, dtype=np.float64)
    size = strength * float(np.sqrt(squares.mean())) if delta.size else 0.0
    match attack:
        case "sign-flip":
            found = delta * np.float32(-strength)
        case "scale":
            found = delta * np.float32(strength)
        case "noise":
            found = size * rng.standard_normal(delta.shape)
        case "constant":
            found = np.full(delta.shape, size)
        case _:
            assert_never(attack)
    return found.astype("<f4")
