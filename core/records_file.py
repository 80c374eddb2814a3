"""Where records lie: the table [data] of site.toml, and the coordinator's holdout.toml."""

from pathlib import Path

from intramural.core.config import Section, load_config
from intramural.core.values import Text


class RecordsFile(Section):
    """A file of records, and what its columns are."""

    path: Path
    """the records: .csv, .jsonl or .parquet; relative to this file"""
    text: Text
    """column that holds the text"""
    label: Text | None = None
    """classification: column that holds the label"""
    response: Text | None = None
    """generation: column that holds the response"""
    strict: bool = False
    """true: stop at the first bad row; false: skip and count bad rows"""


class HoldoutConfig(Section):
    """holdout.toml: records of the coordinator's own, which no site trains on, to judge by."""

    data: RecordsFile
    """where the records are"""


def load_holdout(path: Path) -> HoldoutConfig:
    """Read holdout.toml; a relative path in it is taken from its folder.

    Raises:
        ConfigError: As `load_config`.
    """
    config = load_config(path, HoldoutConfig)
    data = config.data.model_copy(update={"path": path.resolve().parent / config.data.path})
    return config.model_copy(update={"data": data})
