"""Register: the coordinator's roster, and the journal in which each change of it stands first.

A change is signed, journalled with its signature, and then written to roster.json. The journal
alone can therefore rebuild roster.json, without any private key: after a crash between the two, and
when somebody puts an old roster.json back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from intramural.core.canonical import canonical_json
from intramural.core.errors import ConfigError, TrustError
from intramural.core.files import Held, exclusive, write_json
from intramural.core.journal import Entry, Journal, scan
from intramural.server.folder import CoordinatorFolder
from intramural.trust.envelope import to_base64
from intramural.trust.keys import key_id, public_bytes, read_public, read_signing_key
from intramural.trust.roster import (
    ROSTER_TYPE,
    Roster,
    RosterEntry,
    load_roster,
    open_roster,
    sign_roster,
)

CREATED = "created"
WAIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the journal says the roster is."""

    roster: Roster
    envelope: dict[str, Any]
    """The roster, signed."""


def standing_of(entries: Sequence[Entry], *, key: bytes) -> Standing | None:
    """Return the roster that a journal's entries end at; None: none was created yet.

    Args:
        entries: Of journal.jsonl. Kinds that are not ours are passed over.
        key: The coordinator's public key, which verifies the last version's signature.

    Raises:
        TrustError: An entry is not one of ours, versions have a gap, or the signature is another
            key's.
    """
    roster, signature = None, ""
    for entry in entries:
        if "roster_version" not in entry.body:
            continue
        try:
            if entry.kind == CREATED and roster is None:
                roster = Roster(federation=entry.body["federation"], version=1)
            elif roster is not None:
                changed = RosterEntry.model_validate_json(canonical_json(entry.body["entry"]))
                roster = roster.with_entry(changed)
            signature = str(entry.body["roster_signature"])
        except (ValidationError, KeyError):
            raise TrustError(f"journal entry {entry.seq} is malformed; restore it") from None
        if roster is None or entry.body["roster_version"] != roster.version:
            raise TrustError(f"journal entry {entry.seq} skips a version of the roster; restore it")
    if roster is None:
        return None
    envelope = {
        "payload": to_base64(roster.payload()),
        "payloadType": ROSTER_TYPE,
        "signatures": [{"keyid": key_id(key), "sig": signature}],
    }
    try:
        open_roster(envelope, key=key)
    except TrustError as error:
        raise TrustError(f"journal's last change of the roster: {error}") from error
    return Standing(roster=roster, envelope=envelope)


def mend_roster(folder: Path) -> Roster:
    """Make roster.json what the journal says, if a crash left it behind; no private key is needed.

    Returns:
        The roster.

    Raises:
        TrustError: There is no coordinator in the folder, or journal and roster contradict.
        JournalError: The journal is broken.
        ConfigError: Another command holds the folder.
    """
    place = CoordinatorFolder(root=folder)
    key = read_public(place.signing_public)
    with held(place):
        standing = standing_of(scan(place.journal).entries, key=key)
        return _mended(place, standing, key=key).roster


def versions_behind(folder: Path) -> tuple[Roster, int]:
    """Return roster.json, and how many changes of the journal are not in it.

    Raises:
        TrustError: As `mend_roster`. Nothing is written.
    """
    place = CoordinatorFolder(root=folder)
    key = read_public(place.signing_public)
    found = load_roster(place.roster, key=key)
    standing = standing_of(scan(place.journal).entries, key=key)
    return found, _behind(place, found, standing)


def _behind(place: CoordinatorFolder, found: Roster, standing: Standing | None) -> int:
    if standing is None or found.version > standing.roster.version:
        raise TrustError(
            f"{place.journal}: is behind roster.json, version {found.version}; restore the journal"
        )
    behind = standing.roster.version - found.version
    if behind == 0 and found != standing.roster:
        raise TrustError(
            f"{place.roster}: is not what journal.jsonl says; move it away, and run again"
        )
    return behind


def _mended(place: CoordinatorFolder, standing: Standing | None, *, key: bytes) -> Standing:
    if standing is None:
        raise TrustError(f"{place.root}: has no roster; run `intramural server init` first")
    is_there = place.roster.is_file()
    if not is_there or _behind(place, load_roster(place.roster, key=key), standing):
        write_json(place.roster, standing.envelope)
    return standing


class Register:
    """The roster, held for a change by one process."""

    def __init__(
        self,
        place: CoordinatorFolder,
        *,
        journal: Journal,
        standing: Standing,
        key: Ed25519PrivateKey,
    ) -> None:
        """Take what `open_register` found."""
        self.place = place
        self.journal = journal
        self.roster = standing.roster
        self.envelope = standing.envelope
        self._key = key

    def change(self, kind: str, entry: RosterEntry, **facts: Any) -> None:
        """Sign the next version, journal it, and only then replace roster.json.

        Args:
            kind: What happened, such as 'enrolled'.
            entry: The site as it is from now on.
            facts: More for the journal; nothing secret.
        """
        roster = self.roster.with_entry(entry)
        envelope = sign_roster(roster, self._key)
        self.journal.append(
            kind,
            **facts,
            entry=entry.model_dump(mode="json"),
            roster_version=roster.version,
            roster_signature=envelope["signatures"][0]["sig"],
        )
        write_json(self.place.roster, envelope)
        self.roster, self.envelope = roster, envelope

    def used(self) -> dict[str, str]:
        """Return every signing key and TLS key that ever was enrolled, with its site."""
        found: dict[str, str] = {}
        for entry in self.journal.entries:
            site = entry.body.get("entry")
            if "roster_version" in entry.body and site is not None:
                found[site["signing_key"]] = site["name"]
                if "tls_key" in entry.body:
                    found[entry.body["tls_key"]] = site["name"]
        return found

    @property
    def key(self) -> Ed25519PrivateKey:
        """The coordinator's signing key."""
        return self._key


@contextmanager
def held(place: CoordinatorFolder) -> Iterator[None]:
    """Keep every other command out of a coordinator's journal and roster.

    Raises:
        ConfigError: Another one holds them, for ten seconds now, or the disk refuses.
    """
    try:
        with exclusive(place.lock, wait_s=WAIT_S):
            yield
    except Held:
        raise ConfigError(f"{place.root}: another command is at work there; try again") from None
    except OSError as error:
        raise ConfigError(
            f"{error.filename or place.root}: {error.strerror}; mend that, and run again"
        ) from error


@contextmanager
def open_register(
    folder: Path, *, now: Callable[[], datetime], passphrase: str | None
) -> Iterator[Register]:
    """Hold a coordinator's roster for a change; what a crash left is mended first.

    Args:
        folder: The coordinator's folder.
        now: The journal's clock.
        passphrase: Of the signing key.

    Raises:
        TrustError: The key cannot be read or is not the roster's, or journal and roster
            contradict.
        JournalError: The journal is broken.
        ConfigError: Another command holds the folder.
    """
    place = CoordinatorFolder(root=folder)
    if not place.signing_key.is_file():
        raise TrustError(f"{folder}: has no keys/signing.key; run `intramural server init` first")
    with held(place):
        key = read_signing_key(place.signing_key, passphrase=passphrase)
        public = public_bytes(key)
        if read_public(place.signing_public) != public:
            raise TrustError(f"{place.signing_public}: is not keys/signing.key's; restore both")
        standing = standing_of(scan(place.journal).entries, key=public)
        standing = _mended(place, standing, key=public)
        journal = Journal(place.journal, now=now)
        try:
            yield Register(place, journal=journal, standing=standing, key=key)
        finally:
            journal.close()


def create_register(
    place: CoordinatorFolder,
    *,
    federation: str,
    key: Ed25519PrivateKey,
    now: Callable[[], datetime],
    **facts: Any,
) -> None:
    """Begin the journal and write the roster's first version, without sites.

    Goes on where a crash left an earlier call.

    Args:
        place: The coordinator's folder, held.
        federation: The federation's name.
        key: The coordinator's signing key.
        now: The journal's clock.
        facts: More for the journal; nothing secret.
    """
    public = public_bytes(key)
    journal = Journal(place.journal, now=now)
    try:
        if standing_of(journal.entries, key=public) is None:
            first = Roster(federation=federation, version=1)
            journal.append(
                CREATED,
                **facts,
                federation=federation,
                signing_key=to_base64(public),
                roster_version=1,
                roster_signature=sign_roster(first, key)["signatures"][0]["sig"],
            )
        _mended(place, standing_of(journal.entries, key=public), key=public)
    finally:
        journal.close()


def time_of(now: datetime) -> str:
    """Return a time as rosters write it: UTC, to the second."""
    return now.astimezone(UTC).isoformat(timespec="seconds")
