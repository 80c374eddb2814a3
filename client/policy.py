"""Policy: what a site's own limits say of a federation. They win, and only tighten."""

from intramural.core.errors import DataRefused, Refused
from intramural.core.federation import FederationConfig
from intramural.core.site import SitePolicy


def check_manifest(policy: SitePolicy, federation: FederationConfig) -> None:
    """Compare a federation with the site's limits.

    Raises:
        Refused: The federation asks for what the site does not allow; says which key forbids it.
    """
    if federation.privacy is None and policy.require_privacy:
        raise Refused(
            "policy.require_privacy is true and the federation has no [privacy]; "
            "add it to federation.toml, or set require_privacy = false in site.toml"
        )
    if federation.exchange.kind not in policy.exchange:
        raise Refused(
            f"policy.exchange allows {list(policy.exchange)}, the federation exchanges "
            f"{federation.exchange.kind!r}; add it to policy.exchange in site.toml"
        )


def check_records(policy: SitePolicy, count: int) -> None:
    """Refuse to train on fewer records than the site allows; the count is not told."""
    if count < policy.records_min:
        raise DataRefused("the site holds fewer training records than its policy.records_min")
