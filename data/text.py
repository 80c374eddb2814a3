"""Cleaning of text: one spelling for what reads the same."""

import re
import unicodedata

# White space among the control characters (tab, line ends, separators) is not listed: it becomes a
# space below. The byte order mark counts as a control: files joined by `cat` hold it in the middle.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")


def normalise(text: str) -> str:
    """Return `text` in Unicode NFC, without control characters, white space collapsed and stripped.

    Line ends and tabs become one space; other control characters vanish. Applying it twice changes
    nothing more. Every reader applies it, so equal texts compare equal whatever file held them.
    """
    # Controls go first: one between a letter and its accent would keep NFC from joining the two.
    return " ".join(unicodedata.normalize("NFC", _CONTROLS.sub("", text)).split())
