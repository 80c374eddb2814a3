"""Cleaning of text."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.data.text import normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  chest \t\r\n pain ", "chest pain"),
        ("e\u0301", "\u00e9"),  # letter and accent become one letter
        ("e\0\u0301", "\u00e9"),  # also with a control character between them
        ("a\x07b\x1b[0m\x7f", "ab[0m"),
        ("\ufeffnote", "note"),
        ("a\u00a0b\u3000c\x85d", "a b c d"),
        ("胸痛", "胸痛"),
        ("½ ﬁ", "½ ﬁ"),  # compatible is not the same: NFC, not NFKC
        (" \0\n ", ""),
    ],
)
def test_normalise_spells_alike_what_reads_alike(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text())
def test_normalise_twice_changes_nothing_more(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@given(st.text(alphabet=st.characters(categories=["Cc", "Zs", "Mn", "L"])))
def test_normalise_leaves_no_control_character_and_no_double_space(text: str) -> None:
    clean = normalise(text)
    assert not any(unicodedata.category(char) == "Cc" for char in clean)
    assert "  " not in clean
    assert clean == clean.strip()
