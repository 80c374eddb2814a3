"""Layout: names and shapes to one flat vector and back, and one digest for what fits."""

import hashlib
import json
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from intramural.core.errors import WireError
from intramural.core.layout import Layout, Vector, wire_bytes, written

Arrays = dict[str, NDArray[np.float32]]

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.dictionaries(names, shapes, max_size=6).map(lambda d: Layout(tuple(d.items())))

SMALL = Layout((("a", (2, 3)), ("b", ()), ("c", (2,))))


@given(layouts, st.randoms())
def test_flatten_then_unflatten_gives_the_arrays_in_any_order(
    layout: Layout, random: Random
) -> None:
    rng = np.random.default_rng(random.getrandbits(32))
    arrays: Arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in layout.entries}
    shuffled = list(arrays.items())
    random.shuffle(shuffled)
    back = layout.unflatten(layout.flatten(dict(shuffled)))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].shape == array.shape
        assert np.array_equal(back[name], array)


@given(layouts)
def test_slots_tile_the_vector_without_gap_or_overlap(layout: Layout) -> None:
    owner = np.zeros(layout.size, dtype=int)
    for slot in layout.slots():
        assert slot.stop - slot.start == slot.size == np.zeros(slot.shape).size
        owner[slot.start : slot.stop] += 1
    assert np.all(owner == 1)
    assert layout.nbytes == 4 * layout.size


@given(layouts)
def test_json_reads_back_as_the_same_layout(layout: Layout) -> None:
    back = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert back == layout
    assert back.digest == layout.digest


def test_the_digest_is_sha256_of_names_and_shapes() -> None:
    content = b'[["a",[2,3]],["b",[]],["c",[2]]]'
    assert SMALL.digest == "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        Layout((("b", ()), ("a", (2, 3)), ("c", (2,)))),  # order
        Layout((("a", (3, 2)), ("b", ()), ("c", (2,)))),  # shape, equal size
        Layout((("a", (2, 3)), ("b", (1,)), ("c", (2,)))),  # rank
        Layout((("A", (2, 3)), ("b", ()), ("c", (2,)))),  # name
        Layout((("a", (2, 3)), ("b", ()))),
    ],
)
def test_any_other_layout_has_another_digest(other: Layout) -> None:
    assert other.digest != SMALL.digest


def test_flat_order_is_the_layouts_and_rows_come_first() -> None:
    arrays: Arrays = {
        "c": np.array([8, 9], np.float32),
        "b": np.array(7, np.float32),
        "a": np.array([[1, 2, 3], [4, 5, 6]], np.float32),
    }
    assert SMALL.flatten(arrays).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert Layout.of(arrays).entries == (("c", (2,)), ("b", ()), ("a", (2, 3)))


def test_a_strided_array_is_flattened_by_its_logical_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(3, 2).T
    assert Layout((("a", (2, 3)),)).flatten({"a": array}).tolist() == [0, 2, 4, 1, 3, 5]


def test_unflatten_gives_views_not_copies() -> None:
    vector = np.zeros(9, dtype=np.float32)
    SMALL.unflatten(vector)["b"][...] = 5
    assert vector[6] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": np.zeros(1, np.float32)}, "differ in names"),
        ({"a": np.zeros((3, 2), np.float32)}, "'a' and layout differ in shape"),
        ({"b": np.zeros(1, np.float32)}, "'b' and layout differ in shape"),
    ],
)
def test_flatten_refuses(changes: Arrays, message: str) -> None:
    arrays: Arrays = {n: np.zeros(s, np.float32) for n, s in SMALL.entries}
    with pytest.raises(WireError, match=message):
        SMALL.flatten(arrays | changes)


def test_flatten_refuses_a_missing_array() -> None:
    with pytest.raises(WireError, match="differ in names"):
        SMALL.flatten({"a": np.zeros((2, 3), np.float32), "b": np.array(0, np.float32)})


@pytest.mark.parametrize("shape", [(8,), (10,), (3, 3), (1, 9), ()])
def test_unflatten_refuses_a_vector_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match="does not fit a layout of 9"):
        SMALL.unflatten(np.zeros(shape, np.float32))


def test_a_name_twice_or_a_negative_dimension_is_refused() -> None:
    with pytest.raises(WireError, match="twice"):
        Layout((("a", (1,)), ("a", (2,))))
    with pytest.raises(WireError, match="negative"):
        Layout((("a", (2, -1)),))


def test_a_written_vector_is_read_only_and_is_sent_without_a_copy() -> None:
    def write(vector: Vector) -> None:
        assert vector.tolist() == [0, 0, 0]
        vector[:] = [1, 2, 3]

    vector = written(3, write)
    assert vector.tolist() == [1, 2, 3]
    assert not vector.flags.writeable
    assert id(wire_bytes(vector)) == id(vector.base)


@pytest.mark.parametrize("part", [slice(0, 2), slice(None, None, -1), slice(None)])
def test_a_part_of_a_written_vector_is_sent_as_that_part(part: slice) -> None:
    def write(vector: Vector) -> None:
        vector[:] = [1, 2, 3]

    seen = written(3, write)[part]
    assert np.frombuffer(wire_bytes(seen), "<f4").tolist() == [1, 2, 3][part]


@pytest.mark.parametrize("size", [0, 3, (1 << 20) + 5])
def test_written_memory_is_zeros_until_it_is_written_and_then_read_only(size: int) -> None:
    def fill(out: Vector) -> None:
        assert not out.any()
        out[:] = 2.0

    made = written(size, fill)
    assert made.dtype == np.float32
    assert np.array_equal(made, np.full(size, 2.0, np.float32))
    assert wire_bytes(made) is made.base  # type: ignore[comparison-overlap]
    assert not made.flags.writeable
