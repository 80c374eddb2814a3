"""Refusals: what the coordinator may be told of an error at a site."""

import logging
import re
import traceback

from intramural.core.errors import DataError, DataRefused, IntramuralError, TrainingError
from intramural.core.messages import Refusal

log = logging.getLogger(__name__)


TELLING = (DataError, DataRefused, TrainingError)
"""Errors whose very kind, and more so their counts, come from the records."""
DETAIL_CHARACTERS_MAX = 2000

_QUOTED = re.compile(r"(?<=(['\"`]))~?/(?=[^\s/])(?:(?!\1)[^\n])*/")
"""The folders of a path in quotes, to its last slash."""
_PLAIN = re.compile(r"(?:(?<=[\s(=:,])|^)~?/(?=[^\s/])(?:(?!: |; )[^\n])*/", re.MULTILINE)
"""Those of a path without: with all that may be a folder's name, spaces and quotes as well."""
_ROOT = re.compile(r"(?:(?<=[\s(=:,'\"`])|^)~?/(?=[^\s/])", re.MULTILINE)
_RELATIVE = re.compile(r"[^\s'\"`(=]+/(?=[^\s/])")


def refusal_of(error: Exception, *, site: str, private: bool = False) -> Refusal:
    """Return what may be told of an error: our own messages, else only its type.

    The site's log gets our own messages whole; of another error it gets the places that it passed
    through, never its text. Under [privacy] an error that the records can cause is told apart from
    no other; that there was one is seen.

    Guarantees:
        A file is told of by its name: no folder of the site is in what is returned, unless its
        name holds a colon or a semicolon before a space.
    """
    own, kind = isinstance(error, IntramuralError), type(error).__name__
    if isinstance(error, IntramuralError):
        log.warning("%s: refused (%s): %s", site, error.reason, " ".join(str(error).split()))
    else:
        places = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        log.error("%s: %s at %s", site, kind, " > ".join(places[-6:]))
    if private and (isinstance(error, TELLING) or not own):
        detail = "the site could not take part; its own log says why"
        return Refusal(site=site, reason="at-site", detail=detail)
    if isinstance(error, IntramuralError):
        detail = without_folders(str(error))[:DETAIL_CHARACTERS_MAX]
        return Refusal(site=site, reason=error.reason, detail=detail)
    return Refusal(site=site, reason="internal", detail=f"{kind}; see the site's own log")


def without_folders(text: str) -> str:
    """Return a message of ours with each path cut to its file's name.

    Where a path ends is not marked, and a folder's name may hold spaces: then words between two
    paths are lost rather than a folder told.
    """
    for folders in (_QUOTED, _PLAIN, _ROOT, _RELATIVE):
        text = folders.sub("", text)
    return text
