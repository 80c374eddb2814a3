"""Reading a file of records for a federation's task."""

from intramural.core.errors import Refused
from intramural.core.federation import FederationConfig
from intramural.core.records_file import RecordsFile
from intramural.data.readers import read_records
from intramural.data.records import Columns, Records


def read_for_task(
    data: RecordsFile,
    federation: FederationConfig,
    *,
    source: str,
    person: str | None = None,
    group: str | None = None,
) -> Records:
    """Return a file's usable records.

    Args:
        data: The file and its columns.
        federation: Its task says which of them is the target, and which labels there are.
        source: Configuration file that an error names.
        person: Column of the person a record is about.
        group: Column whose equal values must stay on one side of a split.

    Raises:
        Refused: The target's column is not named.
        DataError: As `read_records`.
    """
    task = federation.task
    key = "label" if task.kind == "classification" else "response"
    target = data.label if task.kind == "classification" else data.response
    if target is None:
        raise Refused(f"{task.kind} needs data.{key} in {source}; name the column")
    columns = Columns(text=data.text, target=target, person=person, group=group)
    return read_records(data.path, columns, labels=task.labels or None, strict=data.strict)
