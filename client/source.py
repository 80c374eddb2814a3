"""Source: where a site's records and tokens come from: its file, or a simulated population."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from intramural.core.federation import FederationConfig
from intramural.core.messages import Split
from intramural.core.site import SiteConfig
from intramural.data.population import Pair, Population, Rows, TokenTable
from intramural.data.records import Record, Records
from intramural.data.task_records import read_for_task
from intramural.models.resident import Resident
from intramural.models.tasks import Tokens


class Source(Protocol):
    """Gives the records of one site."""

    needed: tuple[Split, ...]
    """Splits without which the site cannot take part."""

    def records(self) -> Records:
        """Return all of them.

        Raises:
            DataError: As `read_records`.
        """
        ...

    def tokens(self, resident: Resident, records: Sequence[Record]) -> Tokens:
        """Return some of them as tokens."""
        ...

    def training_tokens(self, resident: Resident) -> Tokens | None:
        """Return the tokens of all training records, or None where the records must be read."""
        ...


class FileSource:
    """The file that site.toml names."""

    needed: tuple[Split, ...] = ("train", "test")

    def __init__(self, site: SiteConfig, federation: FederationConfig) -> None:
        """Read nothing yet."""
        self._site = site
        self._federation = federation

    def records(self) -> Records:
        """Return the file's usable records."""
        data = self._site.data
        return read_for_task(
            data, self._federation, source="site.toml", person=data.person, group=data.group
        )

    def tokens(self, resident: Resident, records: Sequence[Record]) -> Tokens:
        """Return the records as tokens, made now."""
        return resident.task.tokenise(records)

    def training_tokens(self, resident: Resident) -> None:
        """Return None: they are made of the records."""
        del resident


class PopulationSource:
    """One site of a simulated population, whose tokens are made once for all sites and runs."""

    needed: tuple[Split, ...] = ("train",)
    """The simulator tests on all records together: a small site may have none for it."""

    def __init__(self, population: Population, number: int, federation: FederationConfig) -> None:
        """Read nothing yet; sites are numbered from 0."""
        self._population = population
        self._number = number
        self._federation = federation

    def records(self) -> Records:
        """Return the site's records; they were judged when the population was dealt."""
        return Records(records=self._population.records_of(self._number), skipped={})

    def tokens(self, resident: Resident, records: Sequence[Record]) -> Tokens:
        """Return the records' tokens, from the population's file."""
        return self._at(resident, [record.row for record in records if record.row is not None])

    def training_tokens(self, resident: Resident) -> Tokens | None:
        """Return the training records' tokens, as `split_records` and `tokens` would find them."""
        if self._population.has_chains:
            return None
        salt = self._federation.federation.name
        train = self._population.rows_on(self._number, "train", salt=salt)
        if not len(train):
            return None  # whoever reads the records then hears why they are refused
        return self._at(resident, train)

    def _at(self, resident: Resident, rows: Sequence[int] | Rows) -> Tokens:
        table = token_table(self._population, resident)
        inputs, targets = table.of(rows)
        return Tokens(inputs=inputs, targets=targets)


def token_table(population: Population, resident: Resident) -> TokenTable:
    """Return a population's tokens under a federation's model and task, made at first use."""

    def make(records: Sequence[Record]) -> Iterable[Pair]:
        tokens = resident.task.tokenise(records)
        return zip(tokens.inputs, tokens.targets, strict=True)

    return population.tokens(resident.tokens_key, make)
