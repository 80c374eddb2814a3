"""Roster: who is in, by certificate and by key, and nothing that the coordinator did not sign."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from intramural.core.canonical import canonical_json
from intramural.core.errors import TrustError
from intramural.core.files import write_json
from intramural.trust.envelope import sign
from intramural.trust.keys import public_bytes
from intramural.trust.roster import (
    ROSTER_TYPE,
    Roster,
    RosterEntry,
    load_roster,
    open_roster,
    sign_roster,
)
from tests.trust.members import SINCE, digest, entry_of, signing_key

KEY = signing_key("coordinator")
PUBLIC = public_bytes(KEY)
A, B, C = (digest(letter) for letter in "abc")


def roster(*sites: RosterEntry, version: int = 3) -> Roster:
    return Roster(federation="icd", version=version, sites=sites)


def test_a_certificate_leads_to_its_site_and_a_site_to_its_key() -> None:
    found = roster(entry_of("a", A, B), entry_of("b", C))
    assert [found.site_of_certificate(d) for d in (A, B, C)] == ["a", "a", "b"]
    assert found.signing_key_of("b") == public_bytes(signing_key("b"))
    assert found.site_of_certificate(digest("d")) is None
    assert found.signing_key_of("c") is None
    assert found.site_of_certificate("") is None


def test_a_revoked_site_stays_listed_and_is_let_in_no_more() -> None:
    found = roster(entry_of("a", A, state="revoked"), entry_of("b", B))
    assert found.site_of_certificate(A) is None
    assert found.signing_key_of("a") is None
    entry = found.entry("a")
    assert entry is not None
    assert entry.certificates == (A,)
    assert found.site_of_certificate(B) == "b"


def test_a_change_gives_the_next_version_in_order_of_names() -> None:
    first = roster(entry_of("b", B), version=1)
    second = first.with_entry(entry_of("a", A))
    third = second.with_entry(entry_of("b", B, C))
    assert [(r.version, [s.name for s in r.sites]) for r in (first, second, third)] == [
        (1, ["b"]),
        (2, ["a", "b"]),
        (3, ["a", "b"]),
    ]
    assert third.site_of_certificate(C) == "b"
    assert first.site_of_certificate(A) is None


@pytest.mark.parametrize(
    "sites",
    [
        (entry_of("b", B), entry_of("a", A)),
        (entry_of("a", A), entry_of("a", B)),
        (entry_of("a", A), entry_of("b", A)),
        (entry_of("a", A, A),),
        (entry_of("a", A), entry_of("b", B, signing_key=entry_of("a").signing_key)),
    ],
)
def test_two_sites_share_nothing(sites: tuple[RosterEntry, ...]) -> None:
    with pytest.raises(ValidationError, match=r"out of order|share a key or a certificate"):
        roster(*sites)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "A"},
        {"name": ""},
        {"signing_key": ""},
        {"signing_key": "AAAA"},
        {"signing_key": "x"},
        {"certificates": ("sha256:0",)},
        {"state": "known"},
        {"since": "2026-11-26"},
        {"since": "2026-11-26T12:00:00+01:00"},
        {"extra": 1},
    ],
)
def test_an_entry_is_strict(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        entry_of("a", **changes)


def test_a_signed_roster_reads_back(tmp_path: Path) -> None:
    path, made = tmp_path / "roster.json", roster(entry_of("a", A), entry_of("b", B))
    write_json(path, sign_roster(made, KEY))
    assert load_roster(path, key=PUBLIC) == made
    assert open_roster(path.read_text(), key=PUBLIC) == made


def test_what_is_signed_is_canonical_json() -> None:
    entry = entry_of("a", A)
    expected = (
        '{"federation":"icd","sites":[{"certificates":["' + A + '"],"name":"a","signing_key":"'
        f'{entry.signing_key}","since":"{SINCE}","state":"enrolled"}}],"version":3}}'
    )
    assert roster(entry).payload() == expected.encode()


def test_an_older_version_is_refused_by_who_saw_a_newer_one(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    write_json(path, sign_roster(roster(version=3), KEY))
    assert load_roster(path, key=PUBLIC, version_min=3).version == 3
    with pytest.raises(TrustError, match=r"roster\.json: version 3 is older than 4"):
        load_roster(path, key=PUBLIC, version_min=4)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"federation":"icd","sites":[],"version":0}',
        b'{"federation":"icd","sites":[],"version":true}',
        b'{"federation":"icd","sites":[],"version":"1"}',
        b'{"federation":"icd","sites":[],"version":1,"x":1}',
        b'{"federation":"icd","version":1}',  # a default left out: two spellings of one roster
        b'{"federation": "icd","sites":[],"version":1}',
        b'{"version":1,"federation":"icd","sites":[]}',
        b'{"federation":"icd","sites":[],"version":1,"version":1}',
    ],
)
def test_what_the_key_signed_and_is_no_roster_is_refused(payload: bytes) -> None:
    with pytest.raises(TrustError, match="roster is"):
        open_roster(sign(ROSTER_TYPE, payload, KEY), key=PUBLIC)


def test_another_key_and_another_type_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    write_json(path, sign_roster(roster(), signing_key("other")))
    with pytest.raises(TrustError, match=rf"^{path}: envelope is signed by"):
        load_roster(path, key=PUBLIC)
    write_json(path, sign("application/x", roster().payload(), KEY))
    with pytest.raises(TrustError, match=rf"^{path}: envelope holds 'application/x'"):
        load_roster(path, key=PUBLIC)
    with pytest.raises(TrustError, match="none: cannot read: No such file"):
        load_roster(tmp_path / "none", key=PUBLIC)


def test_one_bit_anywhere_in_the_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    content = canonical_json(sign_roster(roster(entry_of("a", A)), KEY))
    for place in range(0, len(content), 2):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(TrustError):
            load_roster(path, key=PUBLIC)


@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_only_a_typed_error_escapes(payload: bytes) -> None:
    with pytest.raises(TrustError):
        open_roster(sign(ROSTER_TYPE, payload, KEY), key=PUBLIC)
    with pytest.raises(TrustError):
        open_roster(payload, key=PUBLIC)


@given(
    st.sampled_from(["federation", "version", "sites", "name", "signing_key", "certificates"]),
    st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
)
def test_only_a_typed_error_escapes_from_what_is_nearly_one(field: str, value: Any) -> None:
    content = json.loads(roster(entry_of("a", A)).payload())
    holder = content if field in content else content["sites"][0]
    if holder[field] == value:
        return
    holder[field] = value
    try:
        payload = canonical_json(content)
    except ValueError:
        return
    try:
        found = open_roster(sign(ROSTER_TYPE, payload, KEY), key=PUBLIC)
    except TrustError:
        return
    assert found.payload() == payload  # another name or version is as good, if the key signed it
