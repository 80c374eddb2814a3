"""Folder: where everything of a coordinator lies."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CoordinatorFolder:
    """Where everything of a coordinator lies."""

    root: Path

    @property
    def keys(self) -> Path:
        """Folder of the private keys."""
        return self.root / "keys"

    @property
    def authority_key(self) -> Path:
        """Issues certificates; not needed to run, so that it may be kept elsewhere."""
        return self.keys / "authority.key"

    @property
    def tls_key(self) -> Path:
        """Of the gate's certificate."""
        return self.keys / "tls.key"

    @property
    def signing_key(self) -> Path:
        """Signs roster, kits, manifests and messages."""
        return self.keys / "signing.key"

    @property
    def signing_public(self) -> Path:
        """Its public half, for processes that only verify."""
        return self.root / "signing.pub"

    @property
    def authority(self) -> Path:
        """The authority's certificate."""
        return self.root / "authority.pem"

    @property
    def tls(self) -> Path:
        """The gate's certificate."""
        return self.root / "tls.pem"

    @property
    def roster(self) -> Path:
        """The signed roster."""
        return self.root / "roster.json"

    @property
    def journal(self) -> Path:
        """Who was enrolled and revoked, and when."""
        return self.root / "journal.jsonl"

    @property
    def kits(self) -> Path:
        """The sites' kits, until they are sent."""
        return self.root / "kits"

    @property
    def lock(self) -> Path:
        """Held by whoever writes the journal or the roster."""
        return self.root / ".register.lock"
