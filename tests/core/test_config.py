"""Configuration files: all problems at once, each `file: key: what; remedy`."""

from pathlib import Path

import pytest

from intramural.core.config import Section, check_config, load_config
from intramural.core.errors import ConfigError


class Part(Section):
    """A table."""

    share: float = 0.5
    """how much of
    the cake"""
    count: int
    """number of guests"""
    note: str | None = None


class Whole(Section):
    """A file with a table, an optional table and a list."""

    part: Part
    other: Part | None = None
    names: tuple[str, ...] = ()


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "whole.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, Whole)
    return str(caught.value).splitlines()


def test_a_good_file_becomes_a_frozen_value(tmp_path: Path) -> None:
    whole = load_config(write(tmp_path, "names = ['ü']\n[part]\ncount = 3\n"), Whole)
    assert whole == Whole(part=Part(count=3), names=("ü",))
    with pytest.raises(ValueError, match="frozen"):
        whole.part.count = 4  # type: ignore[misc]


def test_all_problems_are_told_at_once_each_with_file_key_and_remedy(tmp_path: Path) -> None:
    path = write(tmp_path, "[part]\nshare = 'much'\ncuont = 3\n[other]\ncount = 1.5\nzzz = 0\n")
    assert sorted(refusal(path)) == sorted(
        [
            f"{path}: part.share: input should be a valid number, unable to parse string as a "
            "number, got 'much'; it is: how much of the cake",
            f"{path}: part.count: missing; add it: number of guests",
            f"{path}: part.cuont: unknown key; did you mean 'count'?",
            f"{path}: other.count: input should be a valid integer, got a number with a "
            "fractional part, got 1.5; it is: number of guests",
            f"{path}: other.zzz: unknown key; known keys: share, count, note",
        ]
    )


def test_an_unknown_table_suggests_the_near_one(tmp_path: Path) -> None:
    (line,) = refusal(write(tmp_path, "[part]\ncount = 1\n[prat]\ncount = 2\n"))
    assert line.endswith("whole.toml: prat: unknown key; did you mean 'part'?")


def test_a_key_without_help_and_an_item_of_a_list_are_named_too(tmp_path: Path) -> None:
    lines = refusal(write(tmp_path, "names = ['a', 2]\n[part]\ncount = 1\nnote = 3\n"))
    assert [line.split(": ")[1] for line in lines] == ["part.note", "names.1"]


@pytest.mark.parametrize("value", ["nan", "+nan", "inf", "-inf"])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: str) -> None:
    (line,) = refusal(write(tmp_path, f"[part]\ncount = 1\nshare = {value}\n"))
    assert "part.share: input should be a finite number" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[part\ncount = 1", "not TOML: .*line 1.*; mend that line"),
        ("[part]\ncount = 1\ncount = 2\n", "not TOML: "),
        (b"[part]\ncount = 1 # \xff\n", "not UTF-8 text; save it as UTF-8"),
        ("part = 3", "part: "),
        ("", "part: missing; add it"),
    ],
)
def test_what_is_no_such_file_is_refused(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        load_config(path, Whole)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read: No such file.*; check the"):
        load_config(tmp_path / "none.toml", Whole)
    with pytest.raises(ConfigError, match="cannot read: Is a directory"):
        load_config(tmp_path, Whole)


def test_a_table_from_elsewhere_is_told_by_its_source() -> None:
    with pytest.raises(ConfigError, match=r"^manifest: part: missing"):
        check_config({}, Whole, source="manifest")
    assert check_config({"part": {"count": 1}}, Whole, source="manifest").part.count == 1


def test_a_config_error_exits_with_2() -> None:
    assert ConfigError("x").exit_code == 2  # 2 is "wrong use", STYLE's table
