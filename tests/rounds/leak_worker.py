"""A site's worker whose reading of the records goes wrong as a test asks, once each time.

`python -m tests.rounds.leak_worker --site SITE_TOML`. The file `faults` beside site.toml holds
words, one a line: 'raise' (an exception that quotes a record), 'abort' (the process ends itself
with the records in memory), and two that a hunt must notice: 'log' and 'tell' (a refusal that
quotes one).
"""

import logging
import os
import sys
from pathlib import Path
from urllib.parse import quote

from intramural.client import worker
from intramural.client.agent import SiteAgent
from intramural.core.errors import Refused
from intramural.core.messages import Split
from intramural.models.tasks import Tokens

FAULTS = "faults"

tokens_of = SiteAgent.tokens_of


def next_fault(path: Path) -> str:
    """Take the first word of the file; an empty one when there is none."""
    words = path.read_text().split() if path.is_file() else []
    path.write_text("\n".join(words[1:]))
    return words[0] if words else ""


def faulty(self: SiteAgent, split: Split) -> Tokens:
    """Do what the fault says, then what the agent would."""
    text = self.records_of(split)[0].text
    match next_fault(self.site.data.path.parent / FAULTS):
        case "raise":
            raise ValueError(f"cannot tokenise {text!r}")
        case "abort":
            os.abort()
        case "log":
            logging.getLogger("intramural.client.agent").info("tokenises %s", text)
        case "tell":
            # a canary holds a slash, and what looks like a folder is cut from a refusal
            raise Refused(f"does not like {quote(text, safe='')}; take another")
    return tokens_of(self, split)


if __name__ == "__main__":
    SiteAgent.tokens_of = faulty  # type: ignore[method-assign]
    sys.exit(worker.main())
