"""Every error this package raises on purpose, with its exit code.

IntramuralError
|-- ConfigError        a configuration file is wrong; all its problems are listed       exit 2
|-- DataError          a site's records cannot be read                                  exit 2
|-- ModelError         a base model, adapter or task does not fit                       exit 2
|-- WireError          a message is malformed; nothing of it was used                   exit 1
|-- AggregationError   updates cannot be combined                                       exit 1
|-- JournalError       a journal is broken, or not ours                                 exit 1
|-- CheckpointError    no generation of a checkpoint can be read                        exit 1
|-- LedgerError        a privacy ledger is broken, or another data set's             exit 1
|-- TrainingError      local training went wrong (a loss that is not finite)            exit 1
|-- RoundError         the rounds cannot go on (too few sites)                          exit 1
|   `-- RoundRefused     for the sites' own rules said no, and for nothing else           exit 3
|-- TrustError         a key, certificate, signature or kit is not what it should be  exit 3
|-- Refused            a site's own rules said no                                       exit 3
|   |-- DataRefused    the site's records are not enough; under [privacy] not told why   exit 3
|   |-- AwaitsApproval the site's people have not approved the manifest yet              exit 3
|   |-- EgressRefused  something was stopped from leaving a site                        exit 3
|   |-- BudgetExhausted  the data set's lifetime budget does not cover a round          exit 3
|   `-- Unclippable    a parameter, layer or loss has no exact per-unit gradient rule   exit 3
`-- Interrupted        the operator stopped the run; it can be resumed                  exit 130

Messages name files, keys, columns, counts and hashes, and never hold a record's text: an error
raised at a site may travel to the coordinator.
"""

from collections.abc import Collection


class IntramuralError(Exception):
    """An operator's mistake or a peer's; its message is one line and ends with what to do."""

    exit_code: int = 1

    @property
    def reason(self) -> str:
        """A short machine-readable word for counting, such as 'wire' or 'egress-refused'."""
        return _reason_of(type(self))


class ConfigError(IntramuralError):
    """A configuration file is wrong. All problems found are in the message, one a line."""

    exit_code = 2


class DataError(IntramuralError):
    """A site's records cannot be read; the message names lines and columns, never content."""

    exit_code = 2


class ModelError(IntramuralError):
    """A base model, adapter or task does not fit."""

    exit_code = 2


class WireError(IntramuralError):
    """A message is malformed; it was refused before anything of it was used."""


class AggregationError(IntramuralError):
    """Updates cannot be combined."""


class JournalError(IntramuralError):
    """A journal is broken."""


class CheckpointError(IntramuralError):
    """No generation of a checkpoint can be read."""


class LedgerError(IntramuralError):
    """A privacy ledger is broken, or belongs to another data set."""


class TrainingError(IntramuralError):
    """Local training went wrong."""


class RoundError(IntramuralError):
    """The rounds cannot go on."""


class RoundRefused(RoundError):
    """The rounds cannot go on, for the sites' own rules said no."""

    exit_code = 3


class TrustError(IntramuralError):
    """A key, certificate, signature, kit or seal is not what it should be; nothing was used."""

    exit_code = 3


class Refused(IntramuralError):
    """A site's own rules said no; the reason may travel."""

    exit_code = 3


class DataRefused(Refused):
    """The site's records are too few, or lack a split: a refusal that tells of them."""


class AwaitsApproval(Refused):
    """The site's people have not approved the manifest yet; asked again later, it may pass."""


class EgressRefused(Refused):
    """A site's policy stopped something from leaving the site."""

    def __init__(self, *, item: str, rule: str, remedy: str) -> None:
        """State the item stopped, the rule that stopped it, and what would let it pass."""
        super().__init__(f"refused to send {item}: {rule}. {remedy}")
        self.item = item
        self.rule = rule


class BudgetExhausted(Refused):
    """The data set's lifetime budget does not cover what was asked; nothing was charged."""


class Unclippable(Refused):
    """A trainable parameter, a layer or a loss has no exact per-unit gradient; it is named."""


class Interrupted(IntramuralError):
    """The operator stopped the run; it can be resumed."""

    exit_code = 130


def round_error(message: str, reasons: Collection[str]) -> RoundError:
    """Return the error of rounds that cannot go on; the sites' own rules have their exit code.

    Args:
        message: For people.
        reasons: The word of each refusal and failure that was counted.
    """
    kinds: list[type[IntramuralError]] = [Refused, *Refused.__subclasses__()]
    rules = {_reason_of(kind) for kind in kinds}
    return (RoundRefused if reasons and rules.issuperset(reasons) else RoundError)(message)


def _reason_of(kind: type[IntramuralError]) -> str:
    name = kind.__name__.removesuffix("Error")
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")
