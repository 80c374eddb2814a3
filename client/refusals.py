"""Refusals: what the coordinator may be told of an error at a site."""

import logging
import traceback

from intramural.core.errors import IntramuralError
from intramural.core.messages import Refusal

log = logging.getLogger(__name__)


def refusal_of(error: Exception, *, site: str) -> Refusal:
    """Return what may be told of an error: our own messages, else only its type.

    The site's log gets the places the error passed through, never its text.
    """
    if isinstance(error, IntramuralError):
        log.warning("%s: refused (%s)", site, error.reason)
        return Refusal(site=site, reason=error.reason, detail=str(error)[:2000])
    kind = type(error).__name__
    places = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    log.error("%s: %s at %s", site, kind, " > ".join(places[-6:]))
    return Refusal(site=site, reason="internal", detail=f"{kind}; see the site's own log")
