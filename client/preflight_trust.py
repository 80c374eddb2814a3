"""Preflight of a site's membership: keys, kit, certificates, clock, the way to its coordinator."""

import http.client
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from intramural.client.enrol import SiteFolder, examine_kit
from intramural.client.preflight import Check, Preflight, State, failed
from intramural.core.errors import TrustError
from intramural.trust.certificates import read_certificate
from intramural.trust.endings import DAYS_WARN
from intramural.trust.keys import read_signing_key, read_tls_key
from intramural.trust.kit import Kit, read_kit
from intramural.trust.tls import client_context

CLOCK_WARN, CLOCK_FAIL = timedelta(minutes=1), timedelta(minutes=5)
DIAL_S = 5.0


def trust_checks(flight: Preflight) -> Iterator[Check]:
    """Look at what makes the site a member, as far as it is one."""
    place = SiteFolder(root=flight.folder)
    yield from _keys(flight, place)
    yield from _ledger_clock(flight)
    if not place.kit.is_file():
        remedy = "send trust/request.json to the coordinator; `intramural client join KIT` then"
        yield Check(name="kit", state="warn", told="not joined yet: no kit", remedy=remedy)
        return
    try:
        kit = read_kit(place.kit)
    except TrustError as error:
        yield failed("kit", error)
        return
    yield _kit(flight, place, kit)
    authority = read_certificate(kit.authority, what="authority's certificate")
    for what, found in (("site's", kit.site_certificate()), ("authority's", authority)):
        yield _validity(
            f"{what} certificate",
            found.not_valid_before_utc,
            found.not_valid_after_utc,
            now=flight.now,
        )
    yield from _coordinator(flight, place, kit)


def _keys(flight: Preflight, place: SiteFolder) -> Iterator[Check]:
    """Read both private keys; whether others could is part of it."""
    keys = {place.tls_key: read_tls_key, place.signing_key: read_signing_key}
    if not any(path.is_file() for path in keys):
        remedy = "run `intramural client init`"
        yield Check(name="keys", state="warn", told="not joined yet: no keys", remedy=remedy)
        return
    problems = []
    for path, read in keys.items():
        try:
            read(path, passphrase=flight.passphrase)
        except TrustError as error:
            problems.append(failed("keys", error))
    yield from problems
    if not problems:
        names = " and ".join(path.name for path in keys)
        yield Check(name="keys", state="ok", told=f"{names}, readable by their owner alone")


def _kit(flight: Preflight, place: SiteFolder, kit: Kit) -> Check:
    """Check whose kit it is, and that it is of the keys beside it."""
    name = flight.site.site.name
    if kit.site != name:
        told = f"is that of {kit.site!r}, and site.toml says {name!r}"
        remedy = "join with the site's own kit"
        return Check(name="kit", state="fail", told=told, remedy=remedy)
    try:
        examine_kit(place.root, place.kit, now=flight.now, passphrase=flight.passphrase)
    except TrustError as error:
        return failed("kit", error)
    told = f"federation {kit.federation!r}, coordinator {kit.host}:{kit.port}"
    return Check(name="kit", state="ok", told=told)


def _validity(what: str, begin: datetime, end: datetime, *, now: datetime) -> Check:
    days = (end - now).days
    state: State = "warn" if days < DAYS_WARN else "ok"
    told, remedy = f"valid until {end:%Y-%m-%d}, {days} days", "ask for a new kit"
    if now < begin:
        state, told = "fail", f"valid from {begin:%Y-%m-%d %H:%M} UTC, which is to come"
        remedy = "set this machine's clock"
    elif now > end:
        state, told = "fail", f"ended on {end:%Y-%m-%d}"
    return Check(name=what, state=state, told=told, remedy="" if state == "ok" else remedy)


def _ledger_clock(flight: Preflight) -> Iterator[Check]:
    """Compare the clock with the ledger's last entry, before which nothing is charged."""
    from intramural.privacy.book import read_book
    from intramural.privacy.ledger import CLOCK_BACK_MAX

    path = flight.site.ledger_file
    if not path.is_file():
        return
    last = datetime.fromisoformat(read_book(path).entries[-1].time)
    if last - flight.now > CLOCK_BACK_MAX:
        told = f"behind the ledger's last entry of {last:%Y-%m-%d %H:%M} UTC"
        yield Check(name="clock", state="fail", told=told, remedy="set this machine's clock")


def _coordinator(flight: Preflight, place: SiteFolder, kit: Kit) -> Iterator[Check]:
    """Dial the coordinator, if people asked for it."""
    address = f"{kit.host}:{kit.port}"
    if not flight.online:
        line = f"{address} not dialled"
        yield Check(name="coordinator", state="ok", told=line, remedy="add --online to dial it")
        return
    try:
        socket.create_connection((kit.host, kit.port), timeout=DIAL_S).close()
    except OSError as error:
        yield Check(
            name="coordinator",
            state="fail",
            told=f"{address} cannot be reached: {type(error).__name__}",
            remedy="ask whether it runs, and let the firewall pass this one address and port",
        )
        return
    yield Check(name="coordinator", state="ok", told=f"{address} accepts connections")
    yield _clock(flight, place, kit)


def _clock(flight: Preflight, place: SiteFolder, kit: Kit) -> Check:
    """Compare the clock with the coordinator's, by any HTTP answer's Date."""
    try:
        context = client_context(
            place.certificate, place.tls_key, place.authority, passphrase=flight.passphrase
        )
        line = http.client.HTTPSConnection(kit.host, kit.port, timeout=DIAL_S, context=context)
        try:
            line.request("HEAD", "/")
            date = line.getresponse().getheader("Date")
        finally:
            line.close()
        theirs = parsedate_to_datetime(date or "")
    except TrustError as error:
        return failed("clock", error)
    except (OSError, http.client.HTTPException) as error:
        told = f"the coordinator's gate did not let this site in: {type(error).__name__}"
        return Check(
            name="clock", state="fail", told=told, remedy="compare certificates and roster"
        )
    except ValueError:
        told = "the coordinator tells no time; not compared"
        return Check(name="clock", state="warn", told=told, remedy="keep the clock by NTP")
    apart = abs(theirs.astimezone(UTC) - flight.now.astimezone(UTC))
    state: State = "ok"
    if apart > CLOCK_WARN:
        state = "fail" if apart > CLOCK_FAIL else "warn"
    remedy = "" if state == "ok" else "set this machine's clock, by NTP"
    told = f"{apart.total_seconds():.0f} s from the coordinator's"
    return Check(name="clock", state=state, told=told, remedy=remedy)
