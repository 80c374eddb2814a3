"""A coordinator, its sites and their keys, as tests need them."""

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from intramural.server.founding import init_coordinator
from intramural.server.settings import Coordinator
from intramural.trust.certificates import (
    Authority,
    certificate_digest,
    issue_site_certificate,
    new_authority,
)
from intramural.trust.envelope import to_base64
from intramural.trust.keys import new_tls_key, public_bytes
from intramural.trust.kit import Kit, SiteRequest, make_kit, make_request
from intramural.trust.roster import Roster, RosterEntry, sign_roster

NOW = datetime(2026, 11, 26, 12, 0, 0, tzinfo=UTC)
SINCE = "2026-11-26T12:00:00+00:00"


def clock() -> Callable[[], datetime]:
    """Return a clock that stands still."""
    return lambda: NOW


def signing_key(name: str) -> Ed25519PrivateKey:
    """Return the same key for the same name: tests that fail then fail again."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def request_of(site: str, *, key: str = "") -> SiteRequest:
    return make_request(site, signing_key=signing_key(key or site), tls_key=new_tls_key())


def entry_of(site: str, *certificates: str, **changes: Any) -> RosterEntry:
    fields: dict[str, Any] = {
        "name": site,
        "signing_key": to_base64(public_bytes(signing_key(site))),
        "certificates": certificates,
        "state": "enrolled",
        "since": SINCE,
    }
    return RosterEntry(**fields | changes)


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def new_kit(request: SiteRequest, issuer: Authority | None = None, **changes: Any) -> Kit:
    """Return a kit that a coordinator makes for a request; `changes` replace what it says."""
    issuer = issuer or new_authority("icd", new_tls_key(), now=NOW)
    certificate = issue_site_certificate(issuer, request.csr, site=request.site, now=NOW)
    entry = entry_of(request.site, certificate_digest(certificate), signing_key=request.signing_key)
    fields: dict[str, Any] = {
        "site": request.site,
        "host": "fl.example.org",
        "port": 8443,
        "authority": issuer.certificate,
        "certificate": certificate,
        "roster": Roster(federation="icd", version=2, sites=(entry,)),
        "key": signing_key("coordinator"),
    }
    fields |= changes
    fields.setdefault("envelope", sign_roster(fields["roster"], fields["key"]))
    return make_kit(**fields)


def coordinator(folder: Path, **settings: Any) -> Path:
    """Return the folder of a new coordinator."""
    table = {"name": "icd", "host": "fl.example.org"} | settings
    init_coordinator(folder, Coordinator(**table), now=clock())
    return folder


def openssl(*words: object, fails: bool = False) -> str:
    """Return what OpenSSL's own command says: a second implementation."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl on this machine")
    done = subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout + done.stderr
