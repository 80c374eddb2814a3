"""Request and kit: no secret in them, and no field that can be changed on the way."""

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from intramural.core.canonical import canonical_json
from intramural.core.errors import TrustError
from intramural.trust.certificates import certificate_digest, new_authority, to_pem
from intramural.trust.csr import new_certificate_request
from intramural.trust.document import sign_document
from intramural.trust.envelope import to_base64
from intramural.trust.keys import fingerprint, new_tls_key, public_bytes, tls_key_digest
from intramural.trust.kit import KIT_TYPE, REQUEST_TYPE, Kit, make_request, read_kit, read_request
from intramural.trust.roster import Roster, sign_roster
from tests.trust.members import NOW, digest, entry_of, new_kit, request_of, signing_key

SITE = "st-elsewhere"
REQUEST = request_of(SITE)
AUTHORITY = new_authority("icd", new_tls_key(), now=NOW)
KIT = new_kit(REQUEST, AUTHORITY)
COORDINATOR = signing_key("coordinator")
Read = Callable[[Path], Any]
BOTH = pytest.mark.parametrize(
    ("read", "made"), [(read_request, REQUEST), (read_kit, KIT)], ids=["request", "kit"]
)


def written(folder: Path, content: Any) -> Path:
    path = folder / "file.json"
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)
    return path


def fields(document: Any) -> dict[str, Any]:
    found: dict[str, Any] = document.model_dump(mode="json")
    return found


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every leaf of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for name, one in inner:
        if isinstance(one, dict | list):
            yield from leaves(one, (*path, name))
        else:
            yield (*path, name)


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of a JSON value with one leaf replaced."""
    copy = json.loads(json.dumps(value))
    holder = copy
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = new
    return copy


@BOTH
def test_each_reads_back(tmp_path: Path, read: Read, made: Any) -> None:
    assert read(written(tmp_path, fields(made))) == made
    # mail programs and editors may lay it out anew
    assert read(written(tmp_path, json.dumps(fields(made), indent=4, sort_keys=True))) == made


def test_a_request_says_what_the_keys_say() -> None:
    key, tls = signing_key("x"), new_tls_key()
    request = make_request("x", signing_key=key, tls_key=tls)
    assert (request.site, request.public) == ("x", public_bytes(key))
    assert request.fingerprint == fingerprint(public_bytes(key))
    assert request.tls_key == tls_key_digest(tls)


def test_a_kit_holds_what_a_site_needs() -> None:
    assert (KIT.site, KIT.federation, KIT.host, KIT.port) == (SITE, "icd", "fl.example.org", 8443)
    assert KIT.public == public_bytes(COORDINATOR)
    roster = KIT.open_roster()
    assert roster.signing_key_of(SITE) == REQUEST.public
    assert roster.site_of_certificate(certificate_digest(KIT.certificate)) == SITE
    assert KIT.authority == to_pem(AUTHORITY.certificate)


@BOTH
def test_neither_holds_a_private_key(read: Read, made: Any) -> None:
    text = json.dumps(fields(made))
    assert "PRIVATE" not in text
    for name in (SITE, "coordinator"):
        assert to_base64(signing_key(name).private_bytes_raw()) not in text


@BOTH
def test_every_field_that_is_changed_is_noticed(tmp_path: Path, read: Read, made: Any) -> None:
    content = fields(made)
    paths = list(leaves(content))
    assert len(paths) >= 7
    for path in paths:
        old: Any = content
        for name in path:
            old = old[name]
        news: list[Any] = [None, "", [], {}, 10**400, 1.5, True]
        news += [old + 1] if isinstance(old, int) else [old + "x", old[:-1], old[1:], old.upper()]
        for new in news:
            if new != old or type(new) is not type(old):
                with pytest.raises(TrustError, match=r"file\.json: "):
                    read(written(tmp_path, replaced(content, path, new)))


@BOTH
def test_every_field_that_lacks_or_is_too_many_is_noticed(
    tmp_path: Path, read: Read, made: Any
) -> None:
    content = fields(made)
    for name in content:
        rest = {key: value for key, value in content.items() if key != name}
        with pytest.raises(TrustError, match=r"file\.json: "):
            read(written(tmp_path, rest))
    with pytest.raises(TrustError, match=r"wrong in \['extra'\]"):
        read(written(tmp_path, content | {"extra": 1}))
    twice = json.dumps(content)[:-1] + ',"site":"other"}'
    with pytest.raises(TrustError, match="a key stands twice"):
        read(written(tmp_path, twice))


@BOTH
def test_one_bit_anywhere_is_noticed(tmp_path: Path, read: Read, made: Any) -> None:
    content = canonical_json(fields(made))
    path = tmp_path / "file.json"
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(TrustError):
            read(path)


def test_a_number_beyond_all_numbers_is_refused(tmp_path: Path) -> None:
    # JSON says it, Python reads infinity, and canonical JSON cannot say that
    text = json.dumps(fields(KIT) | {"roster": {"payload": 0}}).replace(
        '"payload": 0', '"a": 1e999'
    )
    with pytest.raises(TrustError, match="holds what cannot have been signed"):
        read_kit(written(tmp_path, text))
    deep = json.dumps(fields(KIT) | {"roster": {"a": 0}})
    for depth in (900, 5000):
        nested = deep.replace('"a": 0', '"a": ' + "[" * depth + "]" * depth)
        with pytest.raises(TrustError):
            read_kit(written(tmp_path, nested))


def test_one_kind_is_not_taken_for_the_other(tmp_path: Path) -> None:
    with pytest.raises(TrustError):
        read_kit(written(tmp_path, fields(REQUEST)))
    with pytest.raises(TrustError):
        read_request(written(tmp_path, fields(KIT)))
    # nor is a signature on the one worth anything on the other
    content = {k: v for k, v in fields(REQUEST).items() if k != "signature"}
    moved = sign_document(KIT_TYPE, content, signing_key(SITE))
    with pytest.raises(TrustError, match="does not verify"):
        read_request(written(tmp_path, moved))


def signed_anew(document: Any, kind: str, key: str, **changes: Any) -> dict[str, Any]:
    """Return a document that its own key signed as it is not: by a liar, not by a carrier."""
    content = {k: v for k, v in fields(document).items() if k != "signature"} | changes
    return sign_document(kind, content, signing_key(key))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": fingerprint(b"x")}, "fingerprint is not that of the key"),
        ({"certificate_request": new_certificate_request("other", new_tls_key())}, "of 'other'"),
        ({"certificate_request": "x"}, "malformed"),
        ({"site": "other"}, "is of 'st-elsewhere', not of 'other'"),
        (
            {"signing_key": to_base64(public_bytes(signing_key("victim")))},
            "fingerprint is not that of the key",
        ),
        (
            {
                "signing_key": to_base64(public_bytes(signing_key("victim"))),
                "fingerprint": fingerprint(public_bytes(signing_key("victim"))),
            },
            "does not verify",  # who does not hold the key cannot ask with it
        ),
    ],
)
def test_a_request_that_lies_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    content = signed_anew(REQUEST, REQUEST_TYPE, SITE, **changes)
    with pytest.raises(TrustError, match=message):
        read_request(written(tmp_path, content))


def roster_with(*certificates: str, **changes: Any) -> Roster:
    options: dict[str, Any] = {"federation": "icd", "version": 2, **changes}
    entry = entry_of(SITE, *certificates, state=options.pop("state", "enrolled"))
    return Roster(sites=(entry,), **options)


OTHER_AUTHORITY = new_authority("icd", new_tls_key(), now=NOW)
DIGEST = certificate_digest(KIT.certificate)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"authority": OTHER_AUTHORITY.certificate}, "not issued by the authority beside it"),
        ({"authority": KIT.site_certificate()}, "not issued by the authority|not an authority's"),
        ({"site": "other"}, "is of another name"),
        ({"roster": roster_with()}, "is not that of 'st-elsewhere' in the roster"),
        ({"roster": roster_with(digest("x"))}, "is not that of 'st-elsewhere' in the roster"),
        ({"roster": roster_with(DIGEST, state="revoked")}, "is not that of 'st-elsewhere'"),
        (
            {"envelope": sign_roster(roster_with(DIGEST), signing_key("other"))},
            "envelope is signed by",
        ),
        (
            {"envelope": sign_roster(roster_with(DIGEST, federation="other"), COORDINATOR)},
            "is of another name",
        ),
    ],
)
def test_a_kit_whose_parts_do_not_belong_together_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    kit = new_kit(REQUEST, AUTHORITY, certificate=KIT.site_certificate(), **changes)
    with pytest.raises(TrustError, match=message):
        read_kit(written(tmp_path, fields(kit)))


def test_a_kit_whose_host_was_exchanged_needs_another_coordinators_key(tmp_path: Path) -> None:
    # the whole kit made anew by somebody in between verifies: its fingerprint is another one
    forged = new_kit(REQUEST, OTHER_AUTHORITY, host="evil.example", key=signing_key("evil"))
    found = read_kit(written(tmp_path, fields(forged)))
    assert found.fingerprint != KIT.fingerprint


def test_times_are_checked_apart() -> None:
    KIT.check_times(NOW)
    with pytest.raises(TrustError, match="site's certificate ended on 2027-11-26"):
        KIT.check_times(NOW + timedelta(days=366))
    with pytest.raises(TrustError, match="set this machine's clock"):
        KIT.check_times(NOW - timedelta(days=1))
    ended = new_authority("icd", AUTHORITY.key, now=NOW - timedelta(days=9), days=8)
    kit = Kit.model_validate(fields(KIT) | {"authority": to_pem(ended.certificate)})
    with pytest.raises(TrustError, match="authority's certificate ended"):
        kit.check_times(NOW)


@BOTH
def test_files_that_cannot_be_read_are_named(tmp_path: Path, read: Read, made: Any) -> None:
    with pytest.raises(TrustError, match="none: cannot read: No such file"):
        read(tmp_path / "none")
    with pytest.raises(TrustError, match="cannot read: Is a directory"):
        read(tmp_path)
    with pytest.raises(TrustError, match=r"file\.json: not JSON"):
        read(written(tmp_path, "-----BEGIN PRIVATE KEY-----"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@BOTH
@FUZZ
@given(content=st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()))
def test_only_a_typed_error_escapes(tmp_path: Path, read: Read, made: Any, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(TrustError):
        read(path)


@BOTH
@FUZZ
@given(data=st.data(), new=JSON)
def test_only_a_typed_error_escapes_from_what_is_nearly_one(
    tmp_path: Path, read: Read, made: Any, data: st.DataObject, new: Any
) -> None:
    content = fields(made)
    where = data.draw(
        st.sampled_from(list(leaves(content))) | st.sampled_from([(k,) for k in content])
    )
    changed = replaced(content, where, new)
    if canonical_json(content).decode() == json.dumps(changed, sort_keys=True):
        return
    with pytest.raises(TrustError):
        read(written(tmp_path, json.dumps(changed)))
