"""Verdict: what must be true when a world is over, read from its files and its register."""

from collections import Counter
from typing import TYPE_CHECKING

from intramural.core.files import write_json
from intramural.core.journal import scan
from intramural.privacy.book import read_book
from intramural.server.commits import JOURNAL
from intramural.server.orders import MANIFEST, Order
from intramural.server.site_privacy import CHARGED
from intramural.server.standing import verify_run
from intramural.strategies.registry import make_rule
from intramural.trust.envelope import MANIFEST_TYPE, sign
from tests.server.fakes import LAYOUT
from tests.simworld.notary import undisturbed
from tests.simworld.office import BEGINNING
from tests.simworld.site import COORDINATORS, PUBLIC, SimSite

if TYPE_CHECKING:
    from tests.simworld.world import World


def check_end(world: "World", end: str) -> Counter[str]:
    """Hold a world that is over against its promises; return the kinds of all journals' entries.

    Raises:
        AssertionError: One is broken.
    """
    kinds: Counter[str] = Counter()
    if end == "finished":
        _check_result(world)
    else:
        _check_reason(world)
    kinds.update(_checked_journal(world))
    for site in world.sites.values():
        if site.journal.is_file():
            kinds.update(_checked_site(world, site))
    return kinds


def _check_result(world: "World") -> None:
    """I1, I4, I5: each round once, and the very bits of a run in which nothing went wrong."""
    plan, rounds = world.plan, world.register.rounds
    assert [made.round for made in rounds] == list(range(1, plan.rounds + 1))
    digest = world.office.report["digest"]
    assert digest == rounds[-1].vector
    if plan.buffer:
        assert all(len(made.sites) == plan.buffer for made in rounds)
        return
    if plan.is_whole:
        assert all(list(made.sites) == plan.names for made in rounds)
    if plan.kind == "plain":
        sites = [made.sites for made in rounds]
        federation = plan.federation
        calm = undisturbed(lambda: make_rule(federation, LAYOUT), BEGINNING.vector, sites)
        assert digest == calm, "the run ended at other bits than an undisturbed one"


def _check_reason(world: "World") -> None:
    """A run that does not end says what it waits for, and that is not there."""
    witness = world.witness
    assert witness.waits or witness.owed, "the run waits and says nothing"
    assert world.plan.gone_s, f"waits for {witness.waits or witness.owed}, and all are well"
    assert set(witness.owed) <= set(world.plan.gone_s)


def _checked_journal(world: "World") -> Counter[str]:
    """I2, I5, I7: what `server verify` proves, and a reason for every refusal."""
    folder = world.office.folder
    write_json(folder / MANIFEST, sign(MANIFEST_TYPE, _manifest(world), COORDINATORS))
    proof = verify_run(Order(folder=folder), key=PUBLIC)
    assert proof["rounds"] == len(world.register.rounds)
    entries = scan(folder / JOURNAL).entries
    refused = [entry.body for entry in entries if entry.kind == "refused"]
    assert all(body["reason"] for body in refused)
    charged = Counter(entry.body["round"] for entry in entries if entry.kind == CHARGED)
    if world.plan.kind == "hidden":
        released = world.register.released
        assert all(charged[round_] >= count for round_, count in released.items())
    # a process may die between the journal and its word to the witness
    cut_short = len(world.ends) - world.ends.count("finished")
    assert world.refused <= len(refused) <= world.refused + cut_short
    return Counter(entry.kind for entry in entries)


def _manifest(world: "World") -> bytes:
    return world.plan.federation.manifest().encode()


def _checked_site(world: "World", site: SimSite) -> Counter[str]:
    """I2, I6, I7 at a site: charged before trained, approved before trained, reasons for all."""
    entries = scan(site.journal).entries
    kinds = [entry.kind for entry in entries]
    assert all(entry.body["reason"] for entry in entries if entry.kind == "refused")
    made = {s: len(m) for s, m in world.lessons.made.items() if s[0] == site.name}
    if not any(accident.whom == site.name for accident in world.plan.accidents):
        assert set(made.values()) <= {1}, f"{site.name} trained twice what it had answered"
    left = len(site.answers)
    assert kinds.count("trained") >= left
    if world.plan.approved_s and made:
        assert "approved" in kinds, "trained without an approval"
        assert "trained" not in kinds[: kinds.index("approved")]
    if world.plan.is_private and made:
        charges = read_book(site.school.ledger_file).charges.values()
        charged = Counter(c.round for c in charges if c.purpose == "train")
        trained: Counter[int] = Counter()
        for (_, round_, _), count in made.items():
            trained[round_] += count
        assert all(charged[round_] >= count for round_, count in trained.items())
    return Counter(kinds)
