"""Approval: which manifests a site's people have let in."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from intramural.client.harmless import same_shape
from intramural.client.policy import violations
from intramural.client.proposal import (
    Proposal,
    Standing,
    Status,
    payload_of,
    person_of,
    read_proposal,
    standings_of,
)
from intramural.core.errors import AwaitsApproval, ConfigError, JournalError, Refused
from intramural.core.federation import FederationConfig
from intramural.core.files import Held, exclusive, make_folder, sync_folder, write_json
from intramural.core.journal import Journal, scan, utc_now
from intramural.core.site import SitePolicy

PLACES: tuple[Status, ...] = ("pending", "approved", "refused")
"""Folders of the store; a manifest's envelope lies in one of them."""
WAITING_MAX = 64
"""Manifests that may wait at once, so that nobody fills the disk with them."""
ENVELOPE_CHARACTERS_MAX = 1 << 20
PREFIX_MIN = 8
"""Fewest hexadecimal digits that name a manifest."""
LOCK_WAIT_S = 10.0


class Approvals:
    """The manifests of one site: proposed, approved and refused.

    The journal decides, and the files under `pending/`, `approved/` and `refused/` hold the
    manifests; each file is named after its manifest's digest. A decision is in the journal before
    the file moves, and a move that a crash cut off is made up for at the next reading. Several
    processes may share a store: each operation holds the lock PATH.lock beside the journal and
    reads the journal anew. Whoever else writes to that journal holds that lock, as `AuditLog`.

    Guarantees:
        `admit` returns only for a manifest that so many different names approved as
        policy.approvers says, or that policy.approve = 'same-shape' lets in beside one so approved.
        A file that was put or changed by hand approves nothing, and one taken away withdraws the
        approval. Void where an attacker writes both journal and files at the site: whoever can may
        as well run `client approve`, for the names are not authenticated. The coordinator's
        signature is not checked here, but by who calls `admit`, before it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        policy: SitePolicy,
        journal: Path,
        now: Callable[[], datetime] = utc_now,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """Take the site's `state` folder, its policy and the path of its journal; writes nothing.

        Args:
            folder: Holds the store's three folders, made when they are needed.
            policy: Its approve and approvers hold at once, for old approvals too.
            journal: Opened for each operation only, so that processes can take turns.
            now: For the journal and the time a manifest was first seen.
            lock_wait_s: How long another process may hold the store.
        """
        self._folder = folder
        self._policy = policy
        self._journal = journal
        self._now = now
        self._lock_wait_s = lock_wait_s
        self._cached: tuple[tuple[int, ...], dict[str, Standing]] | None = None

    def admit(self, envelope: str, federation: FederationConfig) -> None:
        """Return if a manifest is approved; a new one is kept for the site's people to decide.

        Args:
            envelope: DSSE, as JSON text; its signature was verified by the caller.
            federation: What the caller read from it.

        Raises:
            AwaitsApproval: It is not approved yet.
            Refused: The site's people refused it, too many wait, or it is not what the envelope
                holds.
            JournalError: The journal is broken or held.
        """
        digest, name = federation.digest, federation.federation.name
        manifest = federation.manifest().encode()
        if len(envelope) > ENVELOPE_CHARACTERS_MAX or payload_of(envelope) != manifest:
            raise Refused(
                "the manifest is not what its envelope holds, or too long; install the "
                "coordinator's version of the package"
            )
        with self._locked():
            standing = self._standings().get(digest)
            if standing is not None and standing.status == "refused":
                raise Refused(f"the site's people refused manifest {digest[:19]} of {name!r}")
            if standing is not None and self._counts(standing) and self._settled(digest):
                return
            self._keep(digest, envelope, name=name, standing=standing)
            if like := self._alike(federation):
                facts = {"by": [], "why": "same-shape", "like": like.digest}
                self._decide(digest, "approved", name=name, **facts)
                return
        so_far = "a second" if standing and standing.status == "pending" and standing.by else "its"
        raise AwaitsApproval(
            f"manifest {digest[:19]} of {name!r} waits for {so_far} approval at the site: "
            f"intramural client approve {name}"
        )

    def proposals(self, status: Status | None = None) -> tuple[Proposal, ...]:
        """Return all manifests, or those of one status, in the order they came to it.

        Raises:
            Refused: A file of the store was changed by hand; it is named.
        """
        if not self._journal.is_file():
            return ()  # and no lock file is left by who only looks
        with self._locked():
            standings = self._standings().items()
            found = [
                self._proposal(digest, standing)
                for digest, standing in sorted(standings, key=lambda item: item[1].seq)
                if status in (None, standing.status)
            ]
        return tuple(proposal for proposal in found if proposal is not None)

    def find(self, run: str, *, statuses: tuple[Status, ...] = ("pending",)) -> Proposal:
        """Return the manifest that a federation's name or a digest's first digits mean.

        Args:
            run: A name, of a manifest of one of `statuses`; or digits, of any manifest.
            statuses: Where a name is looked for.

        Raises:
            ConfigError: None is meant, or several are.
        """
        prefix = run.removeprefix("sha256:")
        known = self.proposals()
        found = [
            proposal
            for proposal in known
            if (proposal.federation.federation.name == run and proposal.status in statuses)
            or (len(prefix) >= PREFIX_MIN and proposal.digest[7:].startswith(prefix))
        ]
        if len(found) == 1:
            return found[0]
        if not found:
            raise ConfigError(
                f"{run!r}: no such manifest waits; `intramural client approve` lists those that do"
            )
        digests = ", ".join(proposal.digest[7:19] for proposal in found)
        raise ConfigError(f"{run!r} is the name of {len(found)}: name one by its digest: {digests}")

    def last_approved(self, name: str) -> Proposal | None:
        """Return the newest approved manifest of a federation, or None."""
        with self._locked():
            return self._last_approved(name)

    def approve(self, digest: str, *, by: str) -> bool:
        """Note that somebody approves a manifest; return whether it is approved now.

        Raises:
            Refused: It does not wait, or needs another person.
            ConfigError: `by` is no name.
        """
        person = person_of(by)
        with self._locked():
            standing = self._standings().get(digest)
            proposal = self._proposal(digest, standing)
            if proposal is None or standing is None or self._counts(standing):
                raise Refused(f"manifest {digest[:19]} waits for no approval")
            names = standing.by if standing.status == "pending" else ()
            same = person in {person_of(name) for name in names}
            if same and len(names) < self._policy.approvers:
                raise Refused(f"{by!r} approved it already; the second approver is somebody else")
            names = names if same else (*names, by)
            name = proposal.federation.federation.name
            if len(names) < self._policy.approvers:
                self._append("approval", manifest=digest, run=name, by=by)
                return False
            self._decide(digest, "approved", name=name, by=list(names), why="people")
            return True

    def refuse(self, digest: str, *, by: str) -> None:
        """Note that somebody refuses a manifest, or withdraws its approval; one person suffices.

        Raises:
            Refused: It is not known.
            ConfigError: `by` is no name.
        """
        person_of(by)
        with self._locked():
            proposal = self._proposal(digest, self._standings().get(digest))
            if proposal is None:
                raise Refused(f"manifest {digest[:19]} was never proposed")
            self._decide(digest, "refused", name=proposal.federation.federation.name, by=[by])

    def _counts(self, standing: Standing) -> bool:
        """Return whether an approval satisfies the policy as it is now."""
        if standing.status != "approved":
            return False
        if standing.same_shape:
            return self._policy.approve == "same-shape"
        return len({person_of(name) for name in standing.by}) >= self._policy.approvers

    def _alike(self, federation: FederationConfig) -> Proposal | None:
        """Return the approved manifest beside which another needs no asking, if there is one.

        None where the policy refuses the other: it is shown to people, who may loosen the policy.
        """
        if self._policy.approve != "same-shape" or violations(self._policy, federation):
            return None
        last = self._last_approved(federation.federation.name)
        return last if last and same_shape(last.federation, federation) else None

    def _last_approved(self, name: str) -> Proposal | None:
        standings = sorted(self._standings().items(), key=lambda item: -item[1].seq)
        for digest, standing in standings:
            if standing.run == name and self._counts(standing) and self._settled(digest):
                return self._proposal(digest, standing)
        return None

    def _keep(self, digest: str, envelope: str, *, name: str, standing: Standing | None) -> None:
        """Have a manifest lie in `pending/` and the journal know of it, if neither is so yet."""
        path = self._path("pending", digest)
        waiting = list(path.parent.glob("*.json"))
        if path not in waiting and len(waiting) >= WAITING_MAX:
            raise Refused(
                f"{len(waiting)} manifests wait at the site already; ask its people to decide"
            )
        if standing is None or standing.status != "pending":
            self._append("proposed", manifest=digest, run=name)
        if path not in waiting:
            content = {"envelope": envelope, "first_seen": self._now().isoformat("T", "seconds")}
            write_json(path, content)
        for place in ("approved", "refused"):
            self._path(place, digest).unlink(missing_ok=True)

    def _decide(self, digest: str, status: Status, *, name: str, **facts: Any) -> None:
        """Journal a decision, then move the file: a crash in between is settled later."""
        kind = "refused-by-people" if status == "refused" else status
        self._append(kind, manifest=digest, run=name, **facts)
        self._move(digest, status)

    def _settled(self, digest: str) -> bool:
        """Bring an approved manifest's file to its place; False: somebody took it away."""
        path = self._path("approved", digest)
        if not path.is_file() and not self._move(digest, "approved"):
            return False
        read_proposal(path)
        return True

    def _move(self, digest: str, status: Status) -> bool:
        target = self._path(status, digest)
        for place in PLACES:
            source = self._path(place, digest)
            if place != status and source.is_file():
                read_proposal(source)  # what was changed by hand moves nowhere
                make_folder(target.parent)
                os.replace(source, target)
                sync_folder(target.parent)
                sync_folder(source.parent)
        return target.is_file()

    def _proposal(self, digest: str, standing: Standing | None) -> Proposal | None:
        """Return a manifest with its file, wherever a crash left it; None: it has none."""
        if standing is None:
            return None
        paths = [self._path(place, digest) for place in PLACES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            return None
        return replace(read_proposal(path), status=standing.status, by=standing.by)

    def _path(self, place: Status, digest: str) -> Path:
        return self._folder / place / f"{digest.removeprefix('sha256:')}.json"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the journal's lock, as `AuditLog` does for what it appends."""
        try:
            with exclusive(
                self._journal.with_name(f"{self._journal.name}.lock"), wait_s=self._lock_wait_s
            ):
                yield
        except Held:
            raise JournalError(
                f"{self._journal.name}: another process held it for {self._lock_wait_s:g} s; "
                "try again"
            ) from None

    def _standings(self) -> dict[str, Standing]:
        """Return what the journal says of each manifest; read anew if the file changed."""
        if not self._journal.is_file():
            return {}
        status = self._journal.stat()
        mark = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._cached is None or self._cached[0] != mark:
            self._cached = (mark, standings_of(scan(self._journal).entries))
        return self._cached[1]

    def _append(self, kind: str, **body: Any) -> None:
        journal = Journal(self._journal, now=self._now)
        try:
            journal.append(kind, **body)
        finally:
            journal.close()
