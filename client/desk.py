"""Desk: what a site's resident worker does with one letter, from its seal to the answer's."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from intramural.client.agent import SiteAgent
from intramural.client.approval import Approvals
from intramural.client.audit import AuditLog
from intramural.client.refusals import refusal_of
from intramural.client.replies import ReplyStore, Slot, Unreadable
from intramural.core.canonical import digest_bytes
from intramural.core.config import check_config
from intramural.core.errors import JournalError, Refused, TrustError
from intramural.core.federation import FederationConfig
from intramural.core.letter import Letter, read_request, write_letter
from intramural.core.messages import (
    EvaluateRequest,
    Hello,
    Refusal,
    Reply,
    Request,
    TrainRequest,
    Welcome,
)
from intramural.core.site import SiteConfig, load_site
from intramural.trust.envelope import MANIFEST_TYPE, open_envelope
from intramural.trust.keys import read_signing_key
from intramural.trust.kit import read_kit
from intramural.trust.seal import COORDINATOR, check_seal, sealer, site_role

log = logging.getLogger(__name__)

AGENTS_MAX = 4
"""Manifests whose records stay tokenised; one model is resident whatever this is."""
STALE = "stale"
"""Reason of the refusal of a round that was passed."""


@dataclass(frozen=True, kw_only=True)
class Seals:
    """How a deployed site knows its coordinator, and signs."""

    open_manifest: Callable[[str], bytes]
    """Verifies the manifest's envelope with the coordinator's key; returns the manifest."""
    check: Callable[[str | None, bytes, bytes | None], None]
    """Verifies the coordinator's seal over a header and a vector; raises else."""
    seal: Callable[[bytes, bytes | None], str]
    """Returns the site's seal over a header and a vector."""


class Admits(Protocol):
    """Knows which manifests the site's people approved."""

    def admit(self, envelope: str, federation: FederationConfig) -> None:
        """Return if the manifest is approved.

        Raises:
            Refused: It is not; it waits, or was refused.
        """


class Desk:
    """Answers letters, one at a time: verified, admitted, answered once, journalled, sealed.

    Guarantees:
        Nothing of a letter is used before the coordinator's seal on it and on its manifest is
        verified, and no record is read before the manifest is approved. A vector or a sum
        leaves only once it is stored and the journal says so. The very letter that was answered
        gets the very same answer, without training and without a charge; it passes seal and
        approval again, and the policy no more, which let the answer out already.
        Void without seals, as in tests.
    """

    def __init__(
        self,
        site: SiteConfig,
        *,
        seals: Seals | None,
        approvals: Admits,
        replies: ReplyStore,
        audit: AuditLog,
    ) -> None:
        """Take what the site decided and what it keeps; reads no record and builds no model.

        Args:
            site: As it was when the worker started.
            seals: None: nothing is signed and the manifest comes without an envelope.
            approvals: Asked for every letter.
            replies: The stored answers.
            audit: The site's journal.
        """
        self.site = site
        self.name = site.site.name
        self._seals = seals
        self._approvals = approvals
        self._replies = replies
        self._audit = audit
        self._agents: dict[str, SiteAgent] = {}
        self._passed = _rounds_passed(audit)

    def answer(self, manifest: str, letter: Letter) -> Letter:
        """Return the answer to a letter; a refusal or a failure is an answer too.

        Args:
            manifest: The manifest in its envelope.
            letter: Hostile until its seal is verified.
        """
        private = False
        try:
            federation = self._admitted(manifest, letter)
            private = federation.privacy is not None
            return self._resent(letter, federation) or self._answered(letter, federation)
        except Exception as error:  # noqa: BLE001 (whatever happens, the coordinator gets an answer)
            return self.refuse(error, answers=letter.digest, private=private)

    def close(self) -> None:
        """Close the journal."""
        self._audit.close()

    def refuse(self, error: Exception, *, answers: str | None, private: bool = False) -> Letter:
        """Return a sealed refusal for an error, journalled by its reason alone.

        Args:
            error: What went wrong.
            answers: Digest of the letter that is refused; None: it could not be read.
            private: The federation makes a privacy claim.
        """
        refusal = refusal_of(error, site=self.name, private=private)
        return self._refusal(refusal, answers=answers)

    def _admitted(self, manifest: str, letter: Letter) -> FederationConfig:
        """Return the letter's federation, verified and approved."""
        content = manifest.encode()
        if self._seals is not None:
            content = self._seals.open_manifest(manifest)
            self._seals.check(letter.seal, letter.header.encode(), letter.vector)
        try:
            table = json.loads(content)
        except ValueError:
            raise Refused("the run's manifest is not JSON; submit the run anew") from None
        federation = check_config(table, FederationConfig, source="manifest")
        self._approvals.admit(manifest, federation)
        return federation

    def _resent(self, letter: Letter, federation: FederationConfig) -> Letter | None:
        """Return the stored answer to this very letter, if there is one."""
        try:
            found = self._replies.find(letter, manifest=federation.digest)
        except Unreadable as damaged:
            log.error("%s: a stored answer was damaged; it is computed anew", self.name)
            self._audit.append("reply-damaged", file=str(damaged), letter=letter.digest)
            return None
        if found is None:
            return None
        slot, answer = found
        self._audit.append("resent", round=slot.round, **_facts(answer, letter, federation))
        log.info("%s: sent a stored answer again, round %d", self.name, slot.round)
        return answer

    def _answered(self, letter: Letter, federation: FederationConfig) -> Letter:
        agent = self._agent(federation)
        # reading a vector needs the layout, and so the model; a greeting shall not wait for it
        layout = agent.layout if letter.vector is not None else None
        request = read_request(letter, layout=layout)
        place: dict[str, Any] = {"asked": type(request).__name__, "run_id": request.run}
        if not isinstance(request, Hello):
            place["round"] = request.round
        passed = self._passed.get((federation.digest, request.run), 0)
        if isinstance(request, TrainRequest) and request.round < passed:
            detail = f"the site answered round {passed} of this run already"
            reply: Reply = Refusal(site=self.name, reason=STALE, detail=detail)
        else:
            reply = self._reply(agent, request)
        if isinstance(reply, Refusal):
            return self._refusal(reply, answers=letter.digest, **place)
        answer = self._sealed(reply, answers=letter.digest)
        if not isinstance(request, Hello):
            self._keep(request, letter, answer, federation)
        self._audit.append("sent", **place, **_facts(answer, letter, federation))
        return answer

    def _reply(self, agent: SiteAgent, request: Request) -> Reply:
        """Return the agent's reply, if the disk can store a round's answer.

        Else the coordinator hears so at the greeting, and no charge is made for an answer that
        could not leave.

        Raises:
            JournalError: The disk cannot.
        """
        if isinstance(request, TrainRequest):
            self._replies.check_room(agent.layout.nbytes)
        reply = agent.answer(request)
        if isinstance(reply, Welcome):  # not before: a policy refuses without building the model
            self._replies.check_room(agent.layout.nbytes)
        return reply

    def _keep(
        self,
        request: TrainRequest | EvaluateRequest,
        letter: Letter,
        answer: Letter,
        federation: FederationConfig,
    ) -> None:
        """Note what was done with the records, and store its answer before it is sent."""
        digest, run, round_ = federation.digest, request.run, request.round
        kind = "trained" if isinstance(request, TrainRequest) else "evaluated"
        facts = {"manifest": digest, "run_id": run, "round": round_, "letter": letter.digest}
        facts["private"] = federation.privacy is not None
        self._audit.append(kind, run=federation.federation.name, **facts)
        if isinstance(request, TrainRequest):
            self._passed[digest, run] = max(round_, self._passed.get((digest, run), 0))
        self._replies.keep(Slot.of(letter, manifest=digest, run=run, round_=round_), answer)

    def _agent(self, federation: FederationConfig) -> SiteAgent:
        digest = federation.digest
        agent = self._agents.pop(digest, None) or SiteAgent(self.site, federation)
        self._agents[digest] = agent  # the last used is last
        while len(self._agents) > AGENTS_MAX:
            del self._agents[next(iter(self._agents))]
        return agent

    def _sealed(self, reply: Reply, *, answers: str | None) -> Letter:
        letter = write_letter(reply, answers=answers)
        if self._seals is None:
            return letter
        return replace(letter, seal=self._seals.seal(letter.header.encode(), letter.vector))

    def _refusal(self, refusal: Refusal, *, answers: str | None, **place: Any) -> Letter:
        """Return a sealed refusal; the journal has its reason, and not its detail."""
        try:
            self._audit.append("refused", reason=refusal.reason, letter=answers, **place)
        except JournalError:
            log.error("%s: the journal cannot be written; nothing but refusals leaves", self.name)
        return self._sealed(refusal, answers=answers)


def _facts(answer: Letter, letter: Letter, federation: FederationConfig) -> dict[str, Any]:
    """Return what the journal says of an answer that leaves."""
    vector = answer.vector
    return {
        "run": federation.federation.name,
        "manifest": federation.digest,
        "letter": letter.digest,
        "answer": answer.digest,
        "vector": None if vector is None else digest_bytes(vector),
        "bytes": len(answer.header.encode()) + len(vector or b""),
    }


def _rounds_passed(audit: AuditLog) -> dict[tuple[str, str], int]:
    """Return the last round trained in each run, by manifest and run, as the journal has it."""
    passed: dict[tuple[str, str], int] = {}
    for entry in audit.entries:
        if entry.kind == "trained":
            key = (entry.body["manifest"], entry.body["run_id"])
            passed[key] = max(entry.body["round"], passed.get(key, 0))
    return passed


def open_desk(site_file: Path, *, passphrase: str | None = None) -> Desk:
    """Open a member site's desk: its keys, its kit and what it keeps under `state/`.

    Args:
        site_file: The site's site.toml; `trust/` and `state/` lie beside it.
        passphrase: Of the site's signing key, if it has one.

    Raises:
        ConfigError: site.toml is wrong.
        TrustError: A key or the kit is missing, broken, or another site's.
        JournalError: The site's journal is broken.
    """
    site, home = load_site(site_file), site_file.resolve().parent
    kit = read_kit(home / "trust" / "kit.json")
    if kit.site != site.site.name:
        raise TrustError(f"kit.json is that of {kit.site!r}, site.toml that of {site.site.name!r}")
    key = read_signing_key(home / "trust" / "signing.key", passphrase=passphrase)
    journal = home / "state" / "journal.jsonl"
    return Desk(
        site,
        seals=Seals(
            open_manifest=partial(open_envelope, payload_type=MANIFEST_TYPE, key=kit.public),
            check=partial(check_seal, role=COORDINATOR, public=kit.public),
            seal=sealer(site_role(site.site.name), key),
        ),
        approvals=Approvals(home / "state", policy=site.policy, journal=journal),
        replies=ReplyStore(home / "state" / "replies"),
        audit=AuditLog(journal),
    )
