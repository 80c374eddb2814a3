"""Records as values."""

from intramural.data.records import Columns, Record, Records

CANARY = "canary-8d1f"


def test_a_record_shows_nothing_of_itself() -> None:
    record = Record(text=CANARY, target=CANARY, group=CANARY, person=CANARY)
    assert CANARY not in repr(record)
    assert CANARY not in repr(Records(records=(record,), skipped={}))


def test_columns_name_each_column_once_and_in_order() -> None:
    columns = Columns(text="note", target="chapter", person="id", group="id")
    assert columns.names == ("note", "chapter", "id")
