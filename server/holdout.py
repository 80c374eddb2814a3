"""Holdout: the coordinator's own records, on which [gate] can judge rounds without any site."""

from pathlib import Path
from typing import TYPE_CHECKING

from intramural.core.canonical import digest_json
from intramural.core.errors import ConfigError, TrainingError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.core.metrics import metrics_of
from intramural.core.records_file import load_holdout
from intramural.data.task_records import read_for_task

if TYPE_CHECKING:
    from intramural.models.tasks import Tokens

HOLDOUT = "holdout"
"""Key of a round's record that holds the metrics."""


def check_holdout(federation: FederationConfig, file: Path | None) -> None:
    """Refuse a run whose gate lacks records, or whose records would judge nothing.

    Raises:
        ConfigError: It names key, option and remedy.
    """
    judges = federation.gate is not None and federation.gate.judge == "coordinator"
    if judges and file is None:
        raise ConfigError(
            "gate.judge = 'coordinator' needs records of the coordinator's own; name their "
            "holdout.toml with --holdout, or set gate.judge = 'sites'"
        )
    if file is not None and not judges:
        raise ConfigError(
            f"--holdout {file}: nothing would use it; set gate.judge = 'coordinator', or leave it "
            "out"
        )
    if file is not None:
        load_holdout(file)


class Holdout:
    """The records, and what the federation's model says of them.

    Guarantees:
        The metrics follow from arrays that the rounds have already released, and from records that
        are no site's: judging by them costs no site's record any privacy.
    """

    def __init__(self, file: Path, federation: FederationConfig, places: dict[str, str]) -> None:
        """Read the records of `file`, a holdout.toml.

        Args:
            file: Names the records and their columns.
            federation: Says model and task.
            places: Folders of base models by name.

        Raises:
            ConfigError, DataError, Refused: As `load_holdout` and `read_for_task`.
        """
        data = load_holdout(file).data
        self._records = read_for_task(data, federation, source=str(file)).records
        self._federation = federation
        self._places = places
        self._tokens: Tokens | None = None
        self.digest = digest_json([[record.text, record.target] for record in self._records])
        """Of the records: a run is judged by the same ones to its end."""

    def __len__(self) -> int:
        return len(self._records)

    def measure(self, vector: Vector) -> dict[str, float]:
        """Return the metrics of arrays, shape `(size,)`; nothing if the model diverged."""
        from intramural.models.resident import resident_model  # here: other runs need no torch
        from intramural.models.training import evaluate

        federation = self._federation
        resident = resident_model(federation, places=self._places, device="auto")
        if self._tokens is None:
            self._tokens = resident.task.tokenise(self._records)
        resident.loaded.exchange.write(vector)
        try:
            sums = evaluate(
                resident.loaded,
                resident.task,
                self._tokens,
                batch_size=federation.evaluation.batch_size,
                training=federation.training,
            )
        except TrainingError:
            return {}
        return metrics_of(federation.task.kind, sums)
