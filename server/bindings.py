"""Bindings: which site each Flower node key belongs to, and which of a site's keys is in use.

Flower's fleet API takes any key that signs for itself: every request carries a public key
(`flwr-public-key`) and a signature by it, and SuperLink looks up the node that was registered with
that key (flwr 1.41, superlink/routers/fleet/node_auth.py). So whoever holds a key is that node,
and what ties nodes to sites is the table kept here.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable
from pathlib import Path

from pydantic import Field, ValidationError

from intramural.core.canonical import canonical_json
from intramural.core.config import Section
from intramural.core.errors import TrustError
from intramural.trust.alerts import Alerts
from intramural.trust.denial import Denied
from intramural.trust.proxy import DEACTIVATE, REGISTER, UNREGISTER

SILENCE_S = 10.0
"""How long a site's node must have been silent before another may take its place."""
KEYS_PER_SITE_MAX = 4
"""Of a site's earlier keys, how many are remembered, to tell an old node from a stranger."""
GOODBYES = frozenset({DEACTIVATE, UNREGISTER})
"""What a node that was replaced may still say."""
LAST_WORDS_S = 10.0
"""How long after a node's goodbye a request of it may come: a site's gate holds a pull that finds
nothing, asks again for seconds, and does not see that the node has gone."""
KEY_BYTES_MAX = 1024


class Table(Section):
    """The file: digests of the node keys of each site, the one in use last."""

    sites: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """by site"""


class Bindings:
    """Decides whether a site may speak under a node key.

    Guarantees:
        A key that SuperLink registered for one site is never taken from another, across
        restarts of the gate as far as the table was written. A site has one key in use: a
        second node that registers while the first was heard from in the last `SILENCE_S` is denied,
        and the first is denied once it was replaced; both are told to the operator. A node that
        said goodbye is denied as well, and told of once it should long have been silent.
        A key is bound only after SuperLink has accepted its registration, which proves that the
        site holds it; so no site can claim a key that it merely saw.
    """

    def __init__(self, path: Path, *, alerts: Alerts, clock: Callable[[], float]) -> None:
        """Read the table, if there is one.

        Args:
            path: The table's file; `content` gives what to write there.
            alerts: Told of what looks like two nodes with one site's identity.
            clock: Seconds that never go back.

        Raises:
            TrustError: The file is damaged.
        """
        self._alerts, self._clock = alerts, clock
        self._keys: dict[str, list[str]] = {}
        self._site_of: dict[str, str] = {}
        self._in_use: dict[str, str] = {}
        self._heard: dict[str, float] = {}
        self._left: dict[str, float] = {}
        """When each key's node said goodbye."""
        for site, keys in _read(path).items():
            self._keys[site] = list(keys)
            self._site_of |= dict.fromkeys(keys, site)
            self._in_use[site] = keys[-1]
            self._heard[site] = clock()  # it may be there, and be heard from in a moment

    def admit(self, site: str, verb: str, header: str) -> None:
        """Return if the site may make this request under this key.

        Args:
            site: Who asks, by its certificate.
            verb: What it asks.
            header: The request's `flwr-public-key`; empty: it has none.

        Raises:
            Denied: It may not.
        """
        key = _digest(header)
        owner = self._site_of.get(key)
        if owner not in (None, site):
            self._alerts.tell("key-of-another-site", site)
            raise Denied("foreign-key")
        in_use = self._in_use.get(site)
        if verb == REGISTER:
            silent_s = self._clock() - self._heard.get(site, -SILENCE_S)
            if in_use not in (None, key) and silent_s < SILENCE_S:
                self._alerts.tell("second-node", site, silent_s=round(silent_s, 1))
                raise Denied("second-node")
        elif owner is None:
            raise Denied("unknown-key")
        elif key != in_use:
            if verb not in GOODBYES:
                left_s = self._clock() - self._left.get(key, -LAST_WORDS_S)
                if left_s >= LAST_WORDS_S:
                    self._alerts.tell("replaced-node-speaks", site)
                raise Denied("superseded-key")
        else:
            self._heard[site] = self._clock()

    def accepted(self, site: str, verb: str, header: str) -> None:
        """Take note that SuperLink accepted a request that was admitted."""
        key = _digest(header)
        if self._site_of.get(key, site) != site:
            return  # another site was accepted with it a moment before
        if verb == REGISTER:
            keys = [k for k in self._keys.get(site, []) if k != key] + [key]
            for old in keys[:-KEYS_PER_SITE_MAX]:
                del self._site_of[old]
                self._left.pop(old, None)
            self._keys[site] = keys[-KEYS_PER_SITE_MAX:]
            self._site_of[key] = site
            self._in_use[site] = key
            self._heard[site] = self._clock()
        elif self._in_use.get(site) == key:
            self._heard[site] = self._clock()
            if verb == UNREGISTER:
                self._left[key] = self._clock()
                del self._in_use[site]  # it said goodbye: its successor need not wait

    def content(self) -> bytes:
        """Return the table, for its file."""
        return canonical_json({"sites": self._keys}) + b"\n"


def _digest(header: str) -> str:
    """Return the digest of the key in a header, as SuperLink decodes it."""
    try:
        key = base64.b64decode(header, validate=True)
    except (binascii.Error, ValueError):
        raise Denied("no-key") from None
    if not 0 < len(key) <= KEY_BYTES_MAX:
        raise Denied("no-key")
    return hashlib.sha256(key).hexdigest()


def _read(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        table = Table.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TrustError(f"{path}: cannot read: {error.strerror}; mend that") from error
    except ValidationError:
        raise TrustError(
            f"{path}: is damaged; remove it, and the nodes will register again"
        ) from None
    sites = {site: keys for site, keys in table.sites.items() if keys}
    held = [key for keys in sites.values() for key in keys]
    if len(set(held)) < len(held):
        raise TrustError(f"{path}: gives one key to two sites; remove it, and nodes register again")
    return sites
