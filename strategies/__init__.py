"""Rules: how updates become the next arrays; one file adapts any rule to Flower and back.

`from intramural.strategies import FedSVD` gives the rule as a strategy of a stock Flower app, for
each name in `flower_named.NAMED`. Flower is imported when such a name is asked for, not before.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if not name[:1].isupper():  # a module of the package: Python then imports it
        raise AttributeError(name)
    from intramural.strategies.flower_named import NAMED, SITE_PART, named_strategy

    if name not in NAMED and name not in SITE_PART:
        raise AttributeError(f"intramural.strategies has no {name!r}; it has {', '.join(NAMED)}")
    found = named_strategy(name)
    globals()[name] = found  # one class a name
    return found
