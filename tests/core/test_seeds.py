"""Seeds: one number, many unrelated streams, the same on every machine."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.seeds import derive_seed, generator


def test_a_seed_is_the_head_of_a_sha256_over_its_path() -> None:
    content = b'[7,"cohort",3,"st-elsewhere"]'
    head = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    assert derive_seed(7, "cohort", 3, "st-elsewhere") == head // 2  # 63 bits: the lowest falls


@given(st.integers(), st.text(st.characters(exclude_categories=["Cs"])), st.integers())
def test_a_seed_has_63_bits(seed: int, use: str, round_: int) -> None:
    assert 0 <= derive_seed(seed, use, round_) < 2**63


def test_every_part_of_the_path_matters() -> None:
    paths: list[tuple[int | str, ...]] = [(), (1,), ("1",), (1, 1), (11,), (1, "a"), ("a", 1)]
    seeds = [derive_seed(s, use, *path) for s in (0, 1) for use in ("a", "b") for path in paths]
    assert len(set(seeds)) == len(seeds)


def test_generators_of_one_path_repeat_and_of_two_paths_are_unrelated() -> None:
    def draw(*path: int | str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return generator(7, "order", *path).standard_normal(4096)

    assert np.array_equal(draw(1, "a"), draw(1, "a"))
    for other in (draw(2, "a"), draw(1, "b"), draw(1)):
        # Independent streams correlate by 1 / sqrt(4096) = 0.016; 0.08 is five deviations.
        assert abs(np.corrcoef(draw(1, "a"), other)[0, 1]) < 0.08


def test_a_path_that_json_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        derive_seed(7, "use", float("nan"))  # type: ignore[arg-type]
