"""Usable: whether a reply may count for what was asked; the first word of no is what is counted."""

from intramural.core.federation import FederationConfig
from intramural.core.messages import Evaluated, Refusal, Update
from intramural.core.metrics import NOISED_SUMS, SUMS_OF, Sums
from intramural.server.machine import Phase
from intramural.server.post import Arrival


def unusable(arrival: Arrival, federation: FederationConfig, *, layout: str) -> str | None:
    """Return why a reply cannot count, or None when it may."""
    reply, (phase, round_, _) = arrival.reply, arrival.tag
    match reply:
        case None:
            return arrival.problem or "wrong-kind"
        case Refusal():
            return reply.reason
        case Update() if phase == Phase.TRAIN:
            fits = reply.layout == layout and reply.weight >= 1
        case Evaluated() if phase != Phase.TRAIN:
            fits = reply.split == ("test" if phase == Phase.TEST else "validation")
            fits = fits and _sums_fit(reply.sums, federation)
        case _:
            return "wrong-kind"
    if reply.site != arrival.site:
        return "identity"
    if reply.round != round_:
        return "stale"
    return None if fits else "wrong-content"


def _sums_fit(sums: Sums, federation: FederationConfig) -> bool:
    """Return whether sums are the task's; else the first site would decide their shapes."""
    task, private = federation.task, federation.privacy is not None
    cells = sums.counts.get("confusion")
    fits = cells is None or cells.size == len(task.labels) ** 2
    return fits and set(sums.counts) == set(NOISED_SUMS if private else SUMS_OF[task.kind])
