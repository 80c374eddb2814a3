"""CSR: a site's request for a certificate (PKCS 10), signed by the TLS key that it is for."""

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from intramural.core.errors import TrustError
from intramural.trust.certificates import (
    MALFORMED,
    PEM_CHARACTERS_MAX,
    SITE_URI,
    common_name_of,
    strictly,
    subject_of,
    tls_key_of,
)


def new_certificate_request(site: str, key: EllipticCurvePrivateKey) -> str:
    """Return a request (PKCS 10, PEM), which the site's TLS key signs."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject_of(site))
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(SITE_URI + site)])
    request = builder.add_extension(names, critical=False).sign(key, SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def read_certificate_request(pem: str, *, site: str) -> x509.CertificateSigningRequest:
    """Read a site's request.

    Raises:
        TrustError: It is not a request as `new_certificate_request` writes it, not signed by its
            own key, of another kind of key, or of another site.
    """
    try:
        with strictly():
            request = x509.load_pem_x509_csr(pem[: PEM_CHARACTERS_MAX + 1].encode())
        is_whole = request.public_bytes(Encoding.PEM).decode() == pem
        is_signed = request.is_signature_valid
        name = common_name_of(request.subject)
        tls_key_of(request, what="certificate request")
    except MALFORMED:
        raise TrustError("certificate request is malformed; ask the site for a new one") from None
    if not is_whole or not is_signed:
        raise TrustError(
            "certificate request is not signed by its own key; ask the site for a new one"
        )
    if name != site:
        raise TrustError(
            f"certificate request is of {name[:63]!r}, not of {site!r}; ask the site for a new one"
        )
    return request
