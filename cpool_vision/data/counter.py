"""Counter-based random numbers: the draws of a sample depend on its key only, not on other samples."""
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes 64-bit integers elementwise with the SplitMix64 finalizer (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class CounterDraws:
    """Streams of uniform random numbers, one per sample, by integer arithmetic.

    The n-th draw of a sample is a hash of its key and n. It is the same on every machine and in every worker, and does
    not depend on which other samples are drawn.

    Args:
        seed: Seed of the dataset, an integer in [0, 2^64).
        stream: Number of the split.
        indices: Indices of the samples, `(N,)` integers.
    """

    def __init__(self, seed: int, stream: int, indices: NDArray[Any]) -> None:
        salt = mix64(mix64(np.asarray([seed & _MASK], np.uint64) + _GOLDEN) ^ np.uint64(stream))
        self._key = mix64(salt + _GOLDEN * (np.asarray(indices).astype(np.uint64) + np.uint64(1)))
        self._count = 0

    def bits(self, n: int) -> NDArray[np.uint64]:
        """Draws `n` integers per sample: `(N, n)` uint64."""
        counter = np.arange(self._count, self._count + n, dtype=np.uint64) + np.uint64(1)
        self._count += n
        return mix64(self._key[:, None] + _GOLDEN * counter[None, :])

    def uniform(self, n: int, low: float = 0.0, high: float = 1.0) -> NDArray[np.float32]:
        """Draws `n` numbers per sample, uniform in [low, high) on a grid of 2^24 steps: `(N, n)` fp32."""
        unit = (self.bits(n) >> np.uint64(40)).astype(np.float32) * np.float32(2.0 ** -24)
        return np.float32(low) + np.float32(high - low) * unit

    def integers(self, n: int, below: int) -> NDArray[np.int64]:
        """Draws `n` integers per sample in [0, below): `(N, n)` int64."""
        return ((self.bits(n) >> np.uint64(32)) * np.uint64(below) >> np.uint64(32)).astype(np.int64)

    def bytes(self, n: int) -> NDArray[np.uint8]:
        """Draws `n` bytes per sample, eight from one hash: `(N, n)` uint8."""
        words = self.bits(-(-n // 8)).astype('<u8')
        return words.view(np.uint8).reshape(len(words), -1)[:, :n]
