"""Denial: why a gate turns a request away, and the answer's status.

The statuses are chosen for what a SuperNode makes of them (flwr 1.41, supercore/retry): at 401 it
ends itself, so that its supervisor starts it with a new key; 403 reads as "this run is over", and
the message is dropped; 502, 503 and 504 are tried again, after 1 to 20 s; others end the call.
"""

STATUSES = {
    "malformed": 400,
    "headers": 400,
    "no-key": 401,
    "unknown-key": 401,
    "superseded-key": 401,
    "not-loopback": 403,
    "host": 403,
    "unknown-certificate": 403,
    "foreign-key": 403,
    "message": 403,
    "bundle": 403,
    "path": 404,
    "method": 405,
    "too-slow": 408,
    "body-size": 413,
    "media-type": 415,
    "head-size": 431,
    "gone": 499,
    "internal": 500,
    "bad-answer": 502,
    "busy": 503,
    "rate": 503,
    "second-node": 503,
    "unreachable": 503,
    "slow-answer": 504,
}
"""HTTP status of each reason; these words are the whole body of an answer and keys of counts."""

ENDING = frozenset({"malformed", "headers", "too-slow", "head-size", "gone", "unknown-certificate"})
"""Reasons after which a connection is not used again: what follows may be read in two ways."""


class Denied(Exception):
    """A request does not pass. Its reason is a word of `STATUSES`, never the peer's text."""

    def __init__(self, reason: str) -> None:
        """Name the reason."""
        assert reason in STATUSES, reason
        super().__init__(reason)
        self.reason = reason

    @property
    def status(self) -> int:
        """The HTTP status of the answer."""
        return STATUSES[self.reason]

    @property
    def body(self) -> bytes:
        """The answer's body: fixed, and carrying nothing of the request."""
        return f"refused: {self.reason}\n".encode()
