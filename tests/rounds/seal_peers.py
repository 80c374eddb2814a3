"""Peers: who may dial a coordinator's gate, and who only has part of what it takes."""

import ssl
from base64 import b64encode
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now as flower_now
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs,
    public_key_to_bytes,
    sign_message,
)

from intramural.client.enrol import examine_kit, init_site, join
from intramural.core.journal import utc_now
from intramural.server.enrol import enrol_site, revoke_site, write_kit
from intramural.simulations.loopback import Loopback
from intramural.trust.certificates import issue_site_certificate, new_authority, to_pem
from intramural.trust.csr import new_certificate_request, read_certificate_request
from intramural.trust.keys import new_tls_key, write_key
from intramural.trust.tls import client_context
from tests.tiny import site


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Somebody who dials the gate."""

    name: str
    tls: ssl.SSLContext | None
    """None: no TLS, straight to SuperLink on its own host."""
    port: int
    key: tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey] = field(
        default_factory=generate_key_pairs
    )
    """Of a Flower node of its own."""

    @property
    def public(self) -> bytes:
        """Its node key's public half, as Flower sends it."""
        return bytes(public_key_to_bytes(self.key[1]))

    def headers(self) -> dict[str, str]:
        """Return what Flower's node authentication asks for, signed by the peer's own key now."""
        time = flower_now().isoformat()
        signature = sign_message(self.key[0], time.encode("ascii"))
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public).decode(),
            TIMESTAMP_HEADER: time,
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
        }


def without_certificate(net: Loopback, port: int) -> Peer:
    """Return somebody who has the CA's certificate and nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=net.coordinator / "authority.pem")
    return Peer(name="CA only", tls=context, port=port)


def of_another_federation(net: Loopback, port: int, *, name: str) -> Peer:
    """Return somebody whom another federation of the same name certified under a site's name."""
    folder, now = net.folder / "another", datetime.now(UTC)
    folder.mkdir()
    authority, key = new_authority(name, new_tls_key(), now=now), new_tls_key()
    request = read_certificate_request(new_certificate_request("site-1", key), site="site-1")
    certificate = issue_site_certificate(authority, request, site="site-1", now=now)
    write_key(folder / "tls.key", key)
    (folder / "tls.pem").write_text(to_pem(certificate))
    return Peer(name="other federation", tls=_context(net, folder), port=port)


def enrolled(net: Loopback, port: int, *, name: str) -> Peer:
    """Return another member site, whose own node is not up."""
    return Peer(name="other site", tls=_context(net, _joined(net, name)), port=port)


def revoked(net: Loopback, port: int, *, name: str) -> Peer:
    """Return a site that was a member."""
    folder = _joined(net, name)
    assert revoke_site(net.coordinator, name)
    return Peer(name="revoked", tls=_context(net, folder), port=port)


def _joined(net: Loopback, name: str) -> Path:
    site_file = site(net.folder, name, [])
    request = init_site(site_file.parent, name=name)
    kit = net.folder / f"{name}.kit"
    write_kit(kit, enrol_site(net.coordinator, request).kit)
    join(site_file.parent, examine_kit(site_file.parent, kit, now=utc_now()))
    return site_file.parent / "trust"


def _context(net: Loopback, papers: Path) -> ssl.SSLContext:
    authority = net.coordinator / "authority.pem"
    return client_context(papers / "tls.pem", papers / "tls.key", authority)
