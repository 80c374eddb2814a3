"""Enrolment at the coordinator: which sites belong to the federation, and with which keys."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from intramural.core.errors import TrustError
from intramural.core.files import write_atomic
from intramural.core.journal import utc_now
from intramural.server.founding import load_authority, settings_of
from intramural.server.register import Register, open_register, time_of
from intramural.trust.certificates import (
    CERTIFICATE_DAYS,
    certificate_digest,
    issue_site_certificate,
)
from intramural.trust.kit import Kit, SiteRequest, make_kit
from intramural.trust.roster import RosterEntry

Clock = Callable[[], datetime]


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """What an enrolment or a rotation gave."""

    kind: str
    """'enrolled', 'renewed' (a new certificate for the same keys) or 'rotated'."""
    kit: Kit
    """To send to the site."""


@dataclass(frozen=True, kw_only=True)
class Issue:
    """How a certificate is issued."""

    now: datetime
    days: int
    passphrase: str | None = field(repr=False)


def enrol_site(
    folder: Path,
    request: SiteRequest,
    *,
    passphrase: str | None = None,
    now: Clock = utc_now,
    days: int = CERTIFICATE_DAYS,
) -> Enrolled:
    """Take a site into the federation, or give one of its members a new certificate.

    Whoever calls this has compared the request's fingerprint with the site.

    Args:
        folder: The coordinator's folder.
        request: As `read_request` verified it.
        passphrase: Of the coordinator's keys.
        now: The clock.
        days: How long the certificate is valid.

    Returns:
        The kit. A member's earlier certificates stay good until they end.

    Raises:
        TrustError: The name has other keys or is revoked, a key is another site's or was revoked,
            or something of the coordinator's cannot be read.
        ConfigError: coordinator.toml is wrong, or another command holds the folder.
    """
    with open_register(folder, now=now, passphrase=passphrase) as register:
        known = register.roster.entry(request.site)
        if known is not None and known.state == "revoked":
            raise TrustError(
                f"site {request.site!r} is revoked; to take it back, have it make new keys with "
                "`intramural client rotate`, and run `intramural server rotate`"
            )
        if known is not None and known.signing_key != request.signing_key:
            raise TrustError(
                f"site {request.site!r} is enrolled with another key; if it made new ones, run "
                "`intramural server rotate`, else ask who sent this request"
            )
        _check_unused(register, request, same_site=True)
        kind = "enrolled" if known is None else "renewed"
        earlier = () if known is None else known.certificates
        since = time_of(now()) if known is None else known.since
        issue = Issue(now=now(), days=days, passphrase=passphrase)
        return _admit(register, request, kind=kind, earlier=earlier, since=since, issue=issue)


def rotate_site(
    folder: Path,
    request: SiteRequest,
    *,
    passphrase: str | None = None,
    now: Clock = utc_now,
    days: int = CERTIFICATE_DAYS,
) -> Enrolled:
    """Give a known site new keys; its old key and certificates count no more from now on.

    Takes a revoked site back, too. See `enrol_site` for arguments and errors.

    Raises:
        TrustError: The site is unknown, or a key of the request was ever enrolled before: whoever
            found an old request could else bring back keys that were lost.
    """
    with open_register(folder, now=now, passphrase=passphrase) as register:
        known = register.roster.entry(request.site)
        if known is None:
            raise TrustError(
                f"site {request.site!r} is not known; run `intramural server enrol` for a new site"
            )
        if (known.signing_key, known.state) == (request.signing_key, "enrolled"):
            raise TrustError(
                f"site {request.site!r} has these keys already; for another kit with them, run "
                "`intramural server enrol`"
            )
        _check_unused(register, request, same_site=False)
        since, issue = time_of(now()), Issue(now=now(), days=days, passphrase=passphrase)
        return _admit(register, request, kind="rotated", earlier=(), since=since, issue=issue)


def _check_unused(register: Register, request: SiteRequest, *, same_site: bool) -> None:
    used = register.used()
    for what, key in (("signing", request.signing_key), ("TLS", request.tls_key)):
        owner = used.get(key)
        if owner is not None and not (same_site and owner == request.site):
            raise TrustError(
                f"the {what} key of this request was enrolled before, for site {owner!r}; "
                "have the site make new keys"
            )


def _admit(
    register: Register,
    request: SiteRequest,
    *,
    kind: str,
    earlier: tuple[str, ...],
    since: str,
    issue: Issue,
) -> Enrolled:
    settings = settings_of(register)
    authority = load_authority(register.place, issue.passphrase)
    certificate = issue_site_certificate(
        authority, request.csr, site=request.site, now=issue.now, days=issue.days
    )
    digest = certificate_digest(certificate)
    entry = RosterEntry(
        name=request.site,
        signing_key=request.signing_key,
        certificates=(*earlier, digest),
        state="enrolled",
        since=since,
    )
    ends = time_of(certificate.not_valid_after_utc)
    register.change(kind, entry, certificate=digest, ends=ends, tls_key=request.tls_key)
    kit = make_kit(
        site=request.site,
        host=settings.host,
        port=settings.port,
        authority=authority.certificate,
        certificate=certificate,
        roster=register.roster,
        envelope=register.envelope,
        key=register.key,
    )
    return Enrolled(kind=kind, kit=kit)


def revoke_site(
    folder: Path, name: str, *, passphrase: str | None = None, now: Clock = utc_now
) -> bool:
    """Shut a site out: its certificates and its key count no more.

    Args:
        folder: The coordinator's folder.
        name: The site's.
        passphrase: Of the coordinator's signing key.
        now: The clock.

    Returns:
        Whether it was enrolled until now.

    Raises:
        TrustError: The site is not known, or something of the coordinator's cannot be read.
        ConfigError: Another command holds the folder.

    Guarantees:
        Once this returns, `load_roster` knows the site's certificates no more. Connections that
        are open are the gate's to close.
    """
    with open_register(folder, now=now, passphrase=passphrase) as register:
        known = register.roster.entry(name)
        if known is None:
            listed = ", ".join(site.name for site in register.roster.sites) or "none"
            raise TrustError(f"site {name!r} is not known; known sites: {listed}")
        if known.state == "enrolled":
            changed = known.model_copy(update={"state": "revoked", "since": time_of(now())})
            register.change("revoked", changed)
        return known.state == "enrolled"


def write_kit(path: Path, kit: Kit) -> None:
    """Write a kit for the site to fetch; nothing in it is secret."""
    write_atomic(path, (kit.model_dump_json(indent=2) + "\n").encode())
