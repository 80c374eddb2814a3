"""Random numbers a privacy claim may rest on: an AES-256 key stream, and what is drawn from it."""

import hashlib
import os
import secrets
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from intramural.core.canonical import canonical_json
from intramural.core.errors import ConfigError

KEY_BYTES = 32
BLOCK_BYTES = 16
PAIRS = 16384
"""Pairs of normals made at a time: their scratch fits a processor's second-level cache."""
COINS = 16384
"""Bernoulli draws made at a time."""
STD_MIN, STD_MAX = 1e-25, 1e25
"""Outside, a draw could leave the range in which float32 keeps its precision."""

_LOG = (2.0, 0.66666816, 0.39974799, 0.2992579)
"""2 atanh(s) / s as a polynomial in s**2, |s| <= 0.1716; relative error below 1e-9."""
_SINE = (0.785398161, -0.0807454347, 0.00249000680, -0.0000359542907)
"""sin(pi t / 4) / t as a polynomial in t**2, |t| <= 1; relative error below 4e-9."""
_LN2 = np.float32(0.6931471805599453)
_ROOT_HALF_BITS = np.int32(0x3F3504F3)
"""The float32 next to sqrt(1/2), as an integer."""
_SMALL = np.int32(1 << 23)
"""31-bit radius words below this have lost precision, and get 64 fresh bits."""
_ENERGY_MIN = np.float32(2.0**-26)
"""Mean of -ln(u) over the values of u that float32 rounds to 1."""


class SecureRandom:
    """Random numbers from AES-256 in counter mode; nothing else may sample or make noise.

    The same key and sequence of calls give the same bits on every machine: the key stream is a
    standard, and what is made of it uses only integer operations and the float32 operations that
    IEEE 754 rounds exactly. One thread makes them, so no thread count can matter. An instance is
    for one thread at a time, and cannot be copied or pickled: a stream used twice is no noise.

    Guarantees:
        Made by `secret`, the stream cannot be told from a uniform one by anybody who does not
        hold the key, if AES-256 is a pseudorandom permutation and the operating system's
        generator is sound. The key is kept in memory only. A forked process takes a new key.

    Not covered:
        `normal` returns float32 numbers, of which there are finitely many, with gaps that differ
        from place to place. An adversary who sees a noised sum's last bits can in principle tell
        which sums are impossible (Mironov 2012, https://doi.org/10.1145/2382196.2382264; for
        Gaussians Haney et al. 2021, https://arxiv.org/abs/2107.10138). The accountant's epsilon
        is that of exact Gaussian noise. Nor is the time a call takes, or a memory dump, covered.
    """

    def __init__(self, key: bytes, *, is_private: bool) -> None:
        """Start the stream of `key`, 32 bytes; use `secret` or `seeded`."""
        self.is_private = is_private
        """False: the key can be recomputed, so no claim may rest on the numbers."""
        self._start(key)

    @classmethod
    def secret(cls) -> Self:
        """Return a generator whose key comes from the operating system and is never shown."""
        return cls(secrets.token_bytes(KEY_BYTES), is_private=True)

    @classmethod
    def seeded(cls, seed: int, *path: int | str) -> Self:
        """Return a generator whose key is the SHA-256 of (seed, path): for tests, NOT PRIVATE."""
        content = canonical_json(["privacy/random", seed, *path])
        return cls(hashlib.sha256(content).digest(), is_private=False)

    @property
    def kind(self) -> str:
        """The generator's name, as the ledger records it."""
        return "aes-256-ctr" if self.is_private else "aes-256-ctr from a seed: NOT PRIVATE"

    def uniform64(self, size: int) -> NDArray[np.uint64]:
        """Return `size` independent uniform 64-bit integers."""
        return self._stream(8 * size).view("<u8").astype(np.uint64, copy=False)

    def seed63(self) -> int:
        """Return a 63-bit seed for a generator of another kind, as torch's for dropout."""
        return int(self.uniform64(1)[0] >> 1)

    def choose(self, population: int, *, probability: float) -> NDArray[np.int64]:
        """Return a Poisson sample of 0 .. population - 1: sorted, and possibly empty.

        Each index is in it independently of the others.

        Guarantees:
            An index is in it with probability floor(probability * 2**64) / 2**64: never more
            than `probability`, and less by under 2**-64.

        Raises:
            ConfigError: `probability` is not in (0, 1].
        """
        if not 0 < probability <= 1:
            raise ConfigError(f"probability must be in (0, 1], got {probability!r}")
        if population < 0:
            raise ConfigError(f"population must be at least 0, got {population!r}")
        if probability == 1:
            return np.arange(population, dtype=np.int64)
        threshold = np.uint64(int(probability * 2.0**64))  # scaling by 2**64 is exact
        parts = [
            first + np.flatnonzero(self.uniform64(min(COINS, population - first)) < threshold)
            for first in range(0, population, COINS)
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def normal(self, size: int, *, std: float) -> NDArray[np.float32]:
        """Return `size` independent draws from N(0, std**2): Box-Muller, in float32.

        A pair of draws takes 31 bits for the radius, 32 for the angle within a half-plane and one
        for its side. A radius beyond 3.3 std (one in 256) is refined by 64 further bits, so tails
        are smooth to 8 std and right to 9.9 std, beyond which a true pair lies with probability
        2**-72. Every draw is finite. The radius is scaled by `std` rounded up to float32.

        Raises:
            ConfigError: `std` is not between 1e-25 and 1e25.

        Source: Box and Muller 1958, https://doi.org/10.1214/aoms/1177706645.
        """
        if not STD_MIN <= std <= STD_MAX:
            raise ConfigError(f"std must be between {STD_MIN} and {STD_MAX}, got {std!r}")
        if size < 0:
            raise ConfigError(f"size must be at least 0, got {size!r}")
        # radius = sqrt(-2 ln u) std, and a double angle doubles the sine: see `_pairs`
        scale = np.float32(std * np.sqrt(2.0))
        if float(scale) < std * np.sqrt(2.0):
            scale = np.nextafter(scale, np.float32(np.inf))
        out = np.empty(size + size % 2, dtype=np.float32)
        for first in range(0, out.size, 2 * PAIRS):
            self._pairs(out[first : first + 2 * PAIRS], scale)
        return out[:size]

    def _pairs(self, out: NDArray[np.float32], scale: np.float32) -> None:
        """Fill `out` with Box-Muller pairs: cosines in its first half, sines in its second."""
        n = out.size // 2
        words = self._stream(8 * n).view("<i4")
        first, second = words[:n], words[n:]
        radius, work = self._scratch[0, :n], self._scratch[1:, :n]
        self._energies(first, radius, work)
        np.sqrt(radius, out=radius)
        np.multiply(radius, scale, out=radius)
        cosine, sine = out[:n], out[n:]
        _angles(second, cosine, sine, work)
        np.multiply(cosine, radius, out=cosine)
        np.multiply(sine, radius, out=sine)
        side = work[0].view(np.int32)
        np.bitwise_and(first, np.int32(-(2**31)), out=side)
        bits = cosine.view(np.int32)
        np.bitwise_xor(bits, side, out=bits)

    def _energies(
        self,
        words: NDArray[np.int32],
        out: NDArray[np.float32],
        work: NDArray[np.float32],
    ) -> None:
        """Write -ln(u) to `out`, u the words' lower 31 bits as a fraction of 2**31."""
        exponent, series, square = work[0].view(np.int32), work[1], work[2]
        np.bitwise_and(words, np.int32(2**31 - 1), out=exponent)
        np.copyto(out, exponent, casting="unsafe")
        small = np.flatnonzero(exponent < _SMALL)
        if small.size:  # u < 2**-8: draw the rest of u afresh, with all of float32's bits
            finer = np.maximum(self.uniform64(small.size), np.uint64(1)).astype(np.float32)
            out[small] = finer * np.float32(2.0**-41)  # 2**31 * 2**-8 / 2**64
        # x = mantissa * 2**exponent, mantissa in [sqrt(1/2), sqrt(2))
        bits = out.view(np.int32)
        np.subtract(bits, _ROOT_HALF_BITS, out=exponent)
        np.right_shift(exponent, 23, out=exponent)
        shifted = square.view(np.int32)
        np.left_shift(exponent, 23, out=shifted)
        np.subtract(bits, shifted, out=bits)
        # ln(mantissa) = 2 atanh(s), s = (mantissa - 1) / (mantissa + 1)
        np.add(out, np.float32(1), out=series)
        np.subtract(out, np.float32(1), out=out)
        np.divide(out, series, out=out)
        np.multiply(out, out, out=square)
        _polynomial(_LOG, square, series)
        np.multiply(series, out, out=series)
        # -ln(x / 2**31) = (31 - exponent) ln 2 - ln(mantissa): no cancellation where u is near 1
        np.subtract(np.int32(31), exponent, out=exponent)
        np.copyto(out, exponent, casting="unsafe")
        np.multiply(out, _LN2, out=out)
        np.subtract(out, series, out=out)
        np.maximum(out, _ENERGY_MIN, out=out)

    def _start(self, key: bytes) -> None:
        self._process = os.getpid()
        cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(BLOCK_BYTES)))
        self._cipher: CipherContext = cipher.encryptor()
        self._scratch = np.empty((4, PAIRS), dtype=np.float32)

    def _stream(self, size_bytes: int) -> NDArray[np.uint8]:
        """Return the next bytes of the key stream."""
        if self.is_private and os.getpid() != self._process:
            self._start(secrets.token_bytes(KEY_BYTES))  # or both processes make one noise
        out = np.empty(size_bytes + BLOCK_BYTES, dtype=np.uint8)  # the cipher asks for a spare
        done = self._cipher.update_into(bytes(size_bytes), out.data)
        assert done == size_bytes
        return out[:size_bytes]


def _polynomial(
    coefficients: tuple[float, ...], x: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """Write the polynomial of x to `out` by Horner's rule, lowest coefficient first."""
    np.multiply(x, np.float32(coefficients[-1]), out=out)
    for coefficient in coefficients[-2:0:-1]:
        np.add(out, np.float32(coefficient), out=out)
        np.multiply(out, x, out=out)
    np.add(out, np.float32(coefficients[0]), out=out)


def _angles(
    words: NDArray[np.int32],
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
    work: NDArray[np.float32],
) -> None:
    """Write cosine and sine of angles uniform in (-pi/2, pi/2), one a 32-bit word."""
    odd, half, square = work[0].view(np.int32), work[1], work[2]
    np.bitwise_or(words, np.int32(1), out=odd)  # odd numbers lie symmetrically around 0
    np.copyto(cosine, odd, casting="unsafe")
    np.multiply(cosine, np.float32(2.0**-31), out=cosine)
    np.multiply(cosine, cosine, out=square)
    _polynomial(_SINE, square, half)
    np.multiply(half, cosine, out=half)  # the sine of half the angle
    np.multiply(half, half, out=square)
    np.subtract(np.float32(1), square, out=cosine)
    np.sqrt(cosine, out=cosine)  # and its cosine
    np.multiply(half, cosine, out=sine)
    np.add(sine, sine, out=sine)
    np.add(square, square, out=square)
    np.subtract(np.float32(1), square, out=cosine)
