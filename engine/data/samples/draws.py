"""Random words as pure functions: no state, any of them at once, the same for ever and on every machine.

Word c of row n is the mixing function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) at position c of a sequence that
starts at the mixed number n. All of it is arithmetic modulo 2**64, element by element.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


def seed_of(*facts: object) -> np.uint64:
    """64 bits that identify `facts`, whose `repr` is the same on every machine."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def mix(words: Words) -> Words:
    """A bijection of 64-bit words whose output bits each depend on all input bits. `words` is overwritten."""
    words ^= words >> _30
    words *= _FIRST
    words ^= words >> _27
    words *= _SECOND
    words ^= words >> _31
    return words


def row_keys(seed: np.uint64, numbers: NDArray[np.int64]) -> Words:
    """The key of each of `numbers` (at least 0), uint64 of the same shape."""
    keys = np.multiply(numbers.astype(np.uint64), _GOLDEN)
    keys += seed
    return mix(keys)


def words(keys: Words, counters: NDArray[np.int64]) -> Words:
    """Uniform words for `keys` and `counters` (at least 0), uint64 of their common shape."""
    steps = np.multiply(counters.astype(np.uint64) + np.uint64(1), _GOLDEN)
    return mix(np.add(keys, steps))


def shares(found: Words) -> NDArray[np.float64]:
    """Numbers in [0, 1) from the upper 53 bits of words."""
    return (found >> _11).astype(np.float64) * 2.0**-53
