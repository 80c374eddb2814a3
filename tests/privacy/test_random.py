"""The cryptographic generator: its key stream, its coins, its normals, and their tails."""

import copy
import hashlib
import math
import os
import pickle
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from intramural.core.errors import ConfigError
from intramural.privacy import random as module
from intramural.privacy.random import SecureRandom, _angles

KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
"""The AES-256 key of NIST SP 800-38A, appendix F."""

KNOWN_WORDS = [6978370680097298679, 15322141621727299791]
KNOWN_CHOICE = [212, 407, 479, 520, 611, 626, 759]
KNOWN_NORMALS = "c942403fd522c53dee48d83f5ed4d93e"
KNOWN_SUM = 632.9534173039965


def words(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.uint32).view(np.int32)


def energies(values: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return -ln(u) as the generator makes it of radius words."""
    random = SecureRandom.seeded(0)
    out = np.empty(values.size, dtype=np.float32)
    random._energies(values, out, random._scratch[1:, : values.size])
    return out.astype(np.float64)


def test_the_key_stream_is_aes_256_of_a_counter() -> None:
    # NIST SP 800-38A, F.1.5: one block at a time, by the other mode
    found = SecureRandom(KEY, is_private=False).uniform64(8)
    counters = b"".join(i.to_bytes(16, "big") for i in range(4))
    block = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    assert found.astype("<u8").tobytes() == block.update(counters)
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    assert block.update(plain).hex() == "f3eed1bdb5d2a03c064b5a7e3db181f8"


def test_a_seed_gives_the_same_bits_on_every_machine() -> None:
    # written down once; another machine, numpy or thread count must not change them
    random = SecureRandom.seeded(7, "round", 3)
    assert random.uniform64(2).tolist() == KNOWN_WORDS
    assert random.choose(1000, probability=0.01).tolist() == KNOWN_CHOICE
    drawn = random.normal(70_001, std=1.5)
    assert drawn[:4].tobytes().hex() == KNOWN_NORMALS
    assert math.fsum(drawn.astype(np.float64).tolist()) == KNOWN_SUM


def test_the_processor_s_vector_units_change_no_bit() -> None:
    numpy_core = import_module("numpy._core._multiarray_umath")
    script = (
        "import hashlib; from intramural.privacy.random import SecureRandom\n"
        "drawn = SecureRandom.seeded(1).normal(100_001, std=0.7)\n"
        "print(hashlib.sha256(drawn.tobytes()).hexdigest())"
    )
    extra = [name for name in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__[name]]
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(extra)}
    plain = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    drawn = SecureRandom.seeded(1).normal(100_001, std=0.7)
    assert plain.stdout.strip() == hashlib.sha256(drawn.tobytes()).hexdigest()


def test_other_seeds_and_paths_give_other_streams() -> None:
    paths: list[tuple[int | str, ...]] = [(1,), (2,), (1, 1), (1, "1"), (1, "a", 2), (1, 2, "a")]
    streams = {tuple(SecureRandom.seeded(0, *path).uniform64(2).tolist()) for path in paths}
    assert len(streams) == len(paths)


def test_only_a_secret_key_is_private_and_no_two_are_the_same() -> None:
    secret, seeded = SecureRandom.secret(), SecureRandom.seeded(1)
    assert (secret.is_private, secret.kind) == (True, "aes-256-ctr")
    assert (seeded.is_private, seeded.kind) == (False, "aes-256-ctr from a seed: NOT PRIVATE")
    assert secret.uniform64(1) != SecureRandom.secret().uniform64(1)


@pytest.mark.parametrize("take", [copy.deepcopy, pickle.dumps])
def test_a_stream_cannot_be_doubled(take: object) -> None:
    assert callable(take)
    with pytest.raises(TypeError):
        take(SecureRandom.secret())


def test_a_forked_process_takes_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    key = bytes(32)
    parent, child = SecureRandom(key, is_private=True), SecureRandom(key, is_private=True)
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    assert child.uniform64(1) != SecureRandom(key, is_private=False).uniform64(1)
    monkeypatch.setattr(os, "getpid", lambda: pid)
    assert parent.uniform64(1) == SecureRandom(key, is_private=False).uniform64(1)


@pytest.mark.parametrize("probability", [1e-3, 0.3, 1 - 2**-53, 1.0])
def test_choose_draws_each_index_with_its_probability(probability: float) -> None:
    population = 200_000
    drawn = SecureRandom.seeded(1).choose(population, probability=probability)
    assert drawn.dtype == np.int64
    assert np.all(np.diff(drawn) > 0)
    assert drawn.size == 0 or (drawn[0] >= 0 and drawn[-1] < population)
    spread = math.sqrt(population * probability * (1 - probability))
    assert abs(drawn.size - population * probability) <= 4 * spread + 1


@pytest.mark.parametrize(
    ("probability", "threshold"),
    [(0.5, 2**63), (2.0**-64, 1), (1e-300, 0), (0.1, 1844674407370955264), (2.0**-65 * 3, 1)],
)
def test_choose_compares_with_the_probability_rounded_down(
    probability: float, threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = [0, max(threshold - 1, 0), threshold, 2**64 - 1]
    given = np.array(around, dtype=np.uint64)
    random = SecureRandom.seeded(1)
    monkeypatch.setattr(random, "uniform64", lambda size: given[:size])
    expected = [i for i, word in enumerate(around) if word < threshold]
    assert random.choose(4, probability=probability).tolist() == expected


def test_choose_of_nobody_and_of_everybody() -> None:
    random = SecureRandom.seeded(1)
    assert random.choose(0, probability=0.5).size == 0
    assert random.choose(100, probability=1e-12).size == 0
    assert random.choose(5, probability=1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_choose_refuses_what_is_no_probability(probability: float) -> None:
    with pytest.raises(ConfigError, match=r"probability must be in \(0, 1\]"):
        SecureRandom.seeded(1).choose(3, probability=probability)


def test_energies_are_minus_the_logarithm() -> None:
    k = words(*(2**31 - 128 * np.arange(1, 60_000, 9)).tolist(), *range(2**23, 2**31, 999_983))
    size = module.PAIRS
    for part in (k[:size], k[size : 2 * size]):
        u = part.astype(np.float32).astype(np.float64) / 2**31
        np.testing.assert_allclose(energies(part), -np.log(u), rtol=3e-7)
    # all ones rounds to u = 1: half a float32 step away from 0, and no root of a negative number
    assert energies(words(2**31 - 1, 2**32 - 1)).tolist() == [2.0**-26, 2.0**-26]


def test_small_radius_words_are_refined_by_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    finer = [0, 1, 2**40 + 12345, 2**64 - 1]
    monkeypatch.setattr(SecureRandom, "uniform64", lambda _, n: np.array(finer[:n], np.uint64))
    found = energies(words(0, 1, 2**23 - 1, 2**31))  # the last is 0 and the sign bit
    u = [2.0**-72, 2.0**-72, (2**40 + 12345) * 2.0**-72, 2.0**-8]  # 2**-8 times a fresh fraction
    np.testing.assert_allclose(found, -np.log(u), rtol=3e-7)
    assert math.sqrt(2 * found.max()) == pytest.approx(9.99, abs=0.01)  # the farthest draw


def test_angles_are_cosine_and_sine() -> None:
    values = words(0, 1, 2**30, 2**31 - 1, 2**31, 2**32 - 1, *range(5, 2**32, 400_009))
    cosine, sine, work = (np.empty((3, values.size), np.float32) for _ in range(3))
    _angles(values, cosine[0], sine[0], work)
    angle = (values | 1).astype(np.float64) / 2**31 * math.pi / 2
    np.testing.assert_allclose(cosine[0], np.cos(angle), atol=4e-7)
    np.testing.assert_allclose(sine[0], np.sin(angle), rtol=4e-7)


N = 2_000_000


@pytest.fixture(scope="module")
def drawn() -> NDArray[np.float64]:
    return SecureRandom.seeded(11).normal(N, std=1.0).astype(np.float64)


def test_normals_have_the_moments_of_a_gaussian(drawn: NDArray[np.float64]) -> None:
    # standard errors: 1/sqrt(n), sqrt(2/n), sqrt(15/n), sqrt(96/n); odd moments are 0
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(drawn**power) - moment) < 4 * math.sqrt(variance / N)


def test_normals_fit_the_gaussian_distribution(drawn: NDArray[np.float64]) -> None:
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    edges = stats.norm.ppf(np.arange(1, 1000) / 1000)
    counts = np.bincount(np.searchsorted(edges, drawn), minlength=1000)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_tails_are_those_of_a_gaussian(drawn: NDArray[np.float64]) -> None:
    for bound in (3.0, 3.5, 4.0, 4.5):
        for count in (np.sum(drawn > bound), np.sum(drawn < -bound)):
            expected = N * stats.norm.sf(bound)
            assert abs(count - expected) < 4 * math.sqrt(expected) + 1


def test_deep_tails_where_a_32_bit_uniform_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Force every radius into the refined part: given u < 2**-8, energy - 8 ln 2 is exponential."""
    n = 16_000
    found = energies(np.zeros(n, dtype=np.int32)) - 8 * math.log(2)
    assert stats.kstest(found, "expon").pvalue > 1e-3
    # 1 in 16,000 there is a radius of sqrt(2 (8 ln 2 + ln 16000)) = 5.52; more than 32 bits follow
    monkeypatch.setattr(SecureRandom, "uniform64", lambda _, n: np.full(n, 2**24, np.uint64))
    assert math.sqrt(2 * energies(words(0))[0]) == pytest.approx(8.157, abs=1e-3)  # u = 2**-48


def test_both_of_a_pair_and_neighbours_are_independent(drawn: NDArray[np.float64]) -> None:
    half = module.PAIRS
    whole = drawn[: N // (2 * half) * 2 * half].reshape(-1, 2, half)
    cosines, sines = whole[:, 0].ravel(), whole[:, 1].ravel()
    for a, b in ((cosines, sines), (cosines**2, sines**2), (drawn[:-1], drawn[1:])):
        correlation = np.corrcoef(a, b)[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.size)
    quadrant = np.bincount(2 * (cosines > 0) + (sines > 0))
    assert stats.chisquare(quadrant).pvalue > 1e-3


@pytest.mark.parametrize("size", [0, 1, 2, 3, 32_767, 32_768, 32_769, 98_305])
def test_any_size_is_filled_with_finite_numbers(size: int) -> None:
    drawn = SecureRandom.seeded(3).normal(size, std=2.0)
    assert drawn.shape == (size,)
    assert drawn.dtype == np.float32
    assert np.isfinite(drawn).all()
    assert size < 32 or abs(drawn.std() / 2 - 1) < 4 / math.sqrt(2 * size)


@pytest.mark.parametrize("std", [1e-25, 0.1, 3.7, 1e25])
def test_the_spread_is_never_below_the_one_asked_for(std: float) -> None:
    one = SecureRandom.seeded(5).normal(1000, std=1 / math.sqrt(2)).astype(np.float64)
    drawn = SecureRandom.seeded(5).normal(1000, std=std).astype(np.float64)
    ratio = np.median(drawn / one) / (std * math.sqrt(2))
    assert 1 - 1e-8 <= ratio < 1 + 3e-7
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 1e-30, 1e38])
def test_noise_that_is_none_is_refused(std: float) -> None:
    with pytest.raises(ConfigError, match="std must be between"):
        SecureRandom.seeded(1).normal(3, std=std)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="size must be at least 0"):
        SecureRandom.seeded(1).normal(-1, std=1.0)
    with pytest.raises(ConfigError, match="population must be at least 0"):
        SecureRandom.seeded(1).choose(-1, probability=0.5)
