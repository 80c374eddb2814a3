"""Seals at the coordinator: whose key a reply must have, and that no reply fits another request."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from intramural.core.errors import TrustError
from intramural.core.letter import Letter, read_request, write_letter
from intramural.core.messages import Hello, Refusal, Reply, TrainRequest, Welcome
from intramural.core.wire import to_letter, to_records
from intramural.server.post import AWAY, Arrival, Post
from intramural.server.seals import CoordinatorSeals
from intramural.simulations.inprocess import InProcessGrid
from intramural.trust.keys import public_bytes
from intramural.trust.roster import Roster, sign_roster
from intramural.trust.seal import COORDINATOR, check_seal, sealer, site_role
from tests.server.fakes import LAYOUT, honest
from tests.trust.members import entry_of, signing_key

COORDINATORS = signing_key("coordinator")
TAG = ("hello", 0, 0)
Change = Callable[[Letter, Letter], Letter]
"""What an attacker makes of a request and its reply."""


def roster_file(folder: Path, *, version: int = 1, first: str = "enrolled") -> Path:
    """Write a roster of site-1, which stands as told, and of site-2."""
    entries = [entry_of("site-1", state=first), entry_of("site-2", state="enrolled")]
    roster = Roster(federation="tiny", version=version, sites=tuple(entries))
    path = folder / "roster.json"
    path.write_text(json.dumps(sign_roster(roster, COORDINATORS)))
    return path


def sealed_by(letter: Letter, *, key: str, role: str) -> Letter:
    seal = sealer(site_role(role), signing_key(key))(letter.header.encode(), letter.vector)
    return replace(letter, seal=seal)


def app_of(change: Change, seen: list[Letter]) -> ClientApp:
    """Return a site-1 that answers honestly, and whose replies somebody changes on the way."""
    app = ClientApp()

    def respond(message: Message, context: Context) -> Message:
        request = to_letter(message.content)
        seen.append(request)
        reply: Reply = honest("site-1", read_request(request, layout=LAYOUT))
        letter = write_letter(reply, answers=request.digest)
        signed = sealed_by(letter, key="site-1", role="site-1")
        return Message(to_records(change(request, signed)), reply_to=message)

    for register in (app.train(), app.evaluate(), app.query()):
        register(respond)
    return app


def asked(folder: Path, change: Change, *, first: str = "enrolled") -> tuple[Arrival, list[Letter]]:
    """Greet site-1 and return what arrives, with the requests it saw."""
    seen: list[Letter] = []
    grid = InProcessGrid(app_of(change, seen), 1, run_config={})
    post = Post(
        grid,
        lambda _: LAYOUT,
        seals=CoordinatorSeals(COORDINATORS, roster_file(folder, first=first)),
    )
    post.send(Hello(manifest="m", run="r"), {"site-1": 1}, tag=TAG)
    (arrival,) = post.arrivals()
    return arrival, seen


def test_a_sealed_reply_is_taken_and_the_request_was_sealed(tmp_path: Path) -> None:
    arrival, (request,) = asked(tmp_path, lambda _, reply: reply)
    assert isinstance(arrival.reply, Welcome)
    assert arrival.problem is None
    public = public_bytes(COORDINATORS)
    check_seal(request.seal, request.header.encode(), None, role=COORDINATOR, public=public)


def other_site(request: Letter, reply: Letter) -> Letter:
    letter = write_letter(
        Welcome(site="site-2", layout="l", base="b", version="0"), answers=request.digest
    )
    return sealed_by(letter, key="site-1", role="site-2")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda _, reply: replace(reply, seal=None), "trust"),
        (lambda _, reply: replace(reply, header=reply.header.replace('"0"', '"1"')), "trust"),
        (lambda _, reply: sealed_by(reply, key="site-2", role="site-1"), "trust"),
        (lambda _, reply: sealed_by(reply, key="site-1", role="site-2"), "trust"),
        (other_site, "trust"),
        (
            lambda _, reply: sealed_by(
                write_letter(honest("site-1", Hello(manifest="m")), answers="sha256:old"),
                key="site-1",
                role="site-1",
            ),
            "wire",
        ),
    ],
)
def test_a_reply_that_is_not_this_sites_own_is_refused(
    tmp_path: Path, change: Change, problem: str
) -> None:
    arrival, _ = asked(tmp_path, change)
    assert (arrival.reply, arrival.problem) == (None, problem)


def test_a_revoked_site_is_refused_at_once_and_an_older_roster_too(tmp_path: Path) -> None:
    arrival, _ = asked(tmp_path, lambda _, reply: reply, first="revoked")
    assert (arrival.reply, arrival.problem) == (None, "trust")


def test_a_revocation_during_a_run_counts(tmp_path: Path) -> None:
    seals = CoordinatorSeals(COORDINATORS, roster_file(tmp_path))
    letter = sealed_by(
        write_letter(Welcome(site="site-1", layout="l", base="b", version="0")),
        key="site-1",
        role="site-1",
    )
    seals.check(letter, site="site-1")
    roster_file(tmp_path, version=2, first="revoked")
    with pytest.raises(TrustError, match="not enrolled, or was revoked"):
        seals.check(letter, site="site-1")
    roster_file(tmp_path, version=1)  # somebody puts the old roster back
    with pytest.raises(TrustError, match="older than 2"):
        seals.check(letter, site="site-1")


def test_a_vector_is_sealed_with_its_header(tmp_path: Path) -> None:
    request = TrainRequest(
        manifest="m", round=1, layout=LAYOUT.digest, vector=np.zeros(LAYOUT.size, np.float32)
    )
    letter = write_letter(honest("site-1", request))
    seals = CoordinatorSeals(COORDINATORS, roster_file(tmp_path))
    good = sealed_by(letter, key="site-1", role="site-1")
    seals.check(good, site="site-1")
    assert good.vector is not None
    flipped = bytes([good.vector[0] ^ 1]) + good.vector[1:]
    with pytest.raises(TrustError, match="does not verify"):
        seals.check(replace(good, vector=flipped), site="site-1")


def test_a_node_may_say_without_a_seal_that_its_worker_is_away_and_nothing_else(
    tmp_path: Path,
) -> None:
    def away(reason: str) -> Change:
        refusal = Refusal(site="unknown", reason=reason, detail="")
        return lambda request, _: write_letter(refusal, answers=request.digest)

    arrival, _ = asked(tmp_path, away(AWAY))
    assert arrival.problem == AWAY
    arrival, _ = asked(tmp_path, away("policy"))
    assert arrival.problem == "trust"
