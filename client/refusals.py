"""Refusals: what the coordinator may be told of an error at a site."""

import logging
import traceback

from intramural.core.errors import DataError, DataRefused, IntramuralError, TrainingError
from intramural.core.messages import Refusal

log = logging.getLogger(__name__)


TELLING = (DataError, DataRefused, TrainingError)
"""Errors whose very kind, and more so their counts, come from the records."""


def refusal_of(error: Exception, *, site: str, private: bool = False) -> Refusal:
    """Return what may be told of an error: our own messages, else only its type.

    The site's log gets the places the error passed through, never its text. Under [privacy] an
    error that the records can cause is told apart from no other; that there was one is seen.
    """
    if private and (isinstance(error, TELLING) or not isinstance(error, IntramuralError)):
        log.warning("%s: refused (%s)", site, type(error).__name__)
        detail = "the site could not take part; its own log says why"
        return Refusal(site=site, reason="at-site", detail=detail)
    if isinstance(error, IntramuralError):
        log.warning("%s: refused (%s)", site, error.reason)
        return Refusal(site=site, reason=error.reason, detail=str(error)[:2000])
    kind = type(error).__name__
    places = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    log.error("%s: %s at %s", site, kind, " > ".join(places[-6:]))
    return Refusal(site=site, reason="internal", detail=f"{kind}; see the site's own log")
