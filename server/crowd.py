"""Crowd: the sites of a large simulation, known by number: nobody greets a million nodes.

Stands where `Directory` does. A site that would refuse a greeting refuses its first request
instead, and counts there. Nothing here grows with the number of sites.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

from intramural.core.messages import Refusal
from intramural.core.site import simulated_name
from intramural.server.post import Arrival

NODE_ID_FIRST = 1
"""Number of the first site's node, in the grids that a simulation has."""


class Names(Sequence[str]):
    """The sites' names, in order; none is kept."""

    def __init__(self, count: int) -> None:
        """So many names."""
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        """Return the name at a place."""
        places = range(self._count)[place]
        if isinstance(places, int):
            return simulated_name(places, self._count)
        return [simulated_name(i, self._count) for i in places]

    def place(self, name: object) -> int | None:
        """Return where a name stands, or None."""
        _, _, digits = str(name).rpartition("-")
        number = int(digits) - 1 if digits.isdecimal() else -1
        known = 0 <= number < self._count and simulated_name(number, self._count) == name
        return number if known else None

    def __contains__(self, name: object) -> bool:
        return self.place(name) is not None


class Nodes(Mapping[str, int]):
    """Each site's node."""

    def __init__(self, names: Names) -> None:
        """The nodes of these sites, numbered in their order."""
        self._names = names

    def __getitem__(self, site: str) -> int:
        place = self._names.place(site)
        if place is None:
            raise KeyError(site)
        return NODE_ID_FIRST + place

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Crowd:
    """All sites are there, always, and nothing is known of them."""

    why = "they are simulated"

    def __init__(self, count: int) -> None:
        """So many sites, named as a simulation names them."""
        self.eligible = Names(count)
        self.nodes = Nodes(self.eligible)

    def greet(self, receive: Callable[[Arrival], None]) -> bool:
        """Do nothing; no greeting is ever open."""
        del receive
        return True

    def took(self, arrival: Arrival) -> bool:
        """Return False: no arrival is an answer to a greeting."""
        del arrival
        return False

    def give_up(self) -> None:
        """Do nothing."""

    def answered(self, site: str) -> None:
        """Do nothing."""

    def refused(self, site: str, node: int, refusal: Refusal) -> None:
        """Do nothing: the site may be drawn again."""

    def missed(self, site: str) -> None:
        """Do nothing: the site may be drawn again."""

    def reasons_of(self, sites_min: int) -> set[str]:
        """Return no reason: no site is missing for long."""
        del sites_min
        return set()
