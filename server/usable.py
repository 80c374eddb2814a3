"""Usable: whether a reply may count for what was asked; the first word of no is what is counted."""

from intramural.core.federation import FederationConfig
from intramural.core.messages import Evaluated, Refusal, Update
from intramural.core.metrics import NOISED_SUMS, PERSONAL, SUMS_OF, Sums, personal_of
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
            fits = fits and _sums_fit(reply.sums, federation, test=phase == Phase.TEST)
        case _:
            return "wrong-kind"
    if reply.site != arrival.site:
        return "identity"
    if reply.round != round_:
        return "stale"
    return None if fits else "wrong-content"


def _sums_fit(sums: Sums, federation: FederationConfig, *, test: bool) -> bool:
    """Return whether sums are the task's; else the first site would decide their shapes.

    With [personal] a test has those of the site's own model, too, and nothing else has.
    """
    task, private, own = federation.task, federation.privacy is not None, personal_of(sums)
    if (own is not None) != (test and federation.personal is not None):
        return False
    named = {name for name in sums.counts if not name.startswith(PERSONAL)}
    parts = [Sums(counts={name: sums.counts[name] for name in named}), *([own] if own else [])]
    wanted = set(NOISED_SUMS if private else SUMS_OF[task.kind])
    cells = [part.counts["confusion"] for part in parts if "confusion" in part.counts]
    fits = all(cell.size == len(task.labels) ** 2 for cell in cells)
    return fits and all(set(part.counts) == wanted for part in parts)
