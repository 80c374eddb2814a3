"""Lost: requests whose node or app died, to be asked again when the site is back.

Flower delivers a message once. A site that is killed while it trains answers with Flower's error,
and its restarted agent would be idle until the next round; asked again, it re-sends the answer it
stored, or computes it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from intramural.server.post import AWAY, Arrival

ABSENT = "absent"
"""Problem of a site that had no node when it was to be asked."""
FLOWER = "flower-"
"""What problems begin with that are Flower's word for a node or an app that failed."""


@dataclass(frozen=True, kw_only=True)
class Again:
    """When and how often a lost request is asked again."""

    pause_s: float = 5.0
    """Between two looks for sites that are back."""
    times_max: int = 5
    """A site that dies so often over one request is at fault itself."""


class Lost:
    """Sites whose request of the present phase was lost."""

    def __init__(self, again: Again | None) -> None:
        """Ask again as `again` says; None: never, as in a simulation, whose nodes come not back."""
        self._again = again
        self._waiting: dict[str, Arrival] = {}
        self._times: dict[str, int] = {}
        self._looked_s = float("-inf")
        self._since_s = 0.0

    def clear(self) -> None:
        """Forget all: another phase begins."""
        self._waiting.clear()
        self._times.clear()

    def took(self, arrival: Arrival, *, now_s: float) -> bool:
        """Keep an arrival that says its request was lost; False when it says something else."""
        problem = arrival.problem or ""
        is_lost = problem.startswith(FLOWER) or problem in (AWAY, ABSENT)
        if self._again is None or not is_lost:
            return False
        times = self._times.get(arrival.site, 0) + 1
        self._times[arrival.site] = times
        if times > self._again.times_max:
            return False
        if not self._waiting:
            self._since_s = now_s
        self._waiting[arrival.site] = arrival
        return True

    def waited_s(self, now_s: float) -> float:
        """Return for how long there have been lost requests."""
        return now_s - self._since_s

    def due(self, now_s: float) -> bool:
        """Return whether it is time to look for sites that are back."""
        if not self._waiting or self._again is None:
            return False
        if now_s - self._looked_s < self._again.pause_s:
            return False
        self._looked_s = now_s
        return True

    def back(self, nodes: Mapping[str, int]) -> list[str]:
        """Return and forget the sites among the connected ones, in order."""
        found = sorted(site for site in self._waiting if site in nodes)
        for site in found:
            del self._waiting[site]
        return found

    def give_up(
        self, offer: Callable[[Arrival], None], *, among: Collection[str] | None = None
    ) -> None:
        """Hand out what is still lost, as the failures they are; of some sites, or of all."""
        for site in [s for s in self._waiting if among is None or s in among]:
            offer(self._waiting.pop(site))
