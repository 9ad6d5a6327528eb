"""Which replica reads which sample: pure functions of the seed and the sample number, with no state to save or restore.

Two maps in a row. `sample_numbers` gives every row of every step a global sample number, 0, 1, 2, ... without gaps.
`Shuffle` maps a global sample number to a sample of the corpus. Neither depends on the layout: with n samples read so
far, the next global batch of G = micro_batch * accum_steps * dp rows is the samples numbered n ... n + G - 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.data.samples.draws import Words, mix, row_keys, seed_of, words

_ROUNDS = 8
"""Even."""
_SORTED = 256
"""Samples up to which an epoch is sorted: a network of so few bits has too few states to be uniform."""


def sample_numbers(
    first_sample: int, micro_index: int, *, dp_rank: int, dp: int, micro_batch: int, accum_steps: int
) -> range:
    """Global sample numbers of one micro-batch of one replica.

    Row r of micro-batch m on replica d reads sample number first_sample + (m*dp + d)*micro_batch + r. All
    tensor-parallel ranks and pipeline stages of a replica read the same rows.

    Raises ValueError when `dp_rank` or `micro_index` is out of range.
    """
    if not 0 <= dp_rank < dp or not 0 <= micro_index < accum_steps:
        raise ValueError(f"dp_rank {dp_rank} of {dp}, micro_index {micro_index} of {accum_steps}")
    start = first_sample + (micro_index * dp + dp_rank) * micro_batch
    return range(start, start + micro_batch)


class Shuffle:
    """The order of `size` samples: another permutation in each epoch, keyed on (seed, fingerprint, epoch).

    A Feistel network permutes the numbers of the smallest power of two that holds `size`; what lies past the end is
    permuted again until it does not (cycle walking: Black and Rogaway, CT-RSA 2002). So the place of any sample costs
    a few operations and no memory, and every epoch has every sample exactly once. Up to 256 samples are sorted by
    random words instead.
    """

    def __init__(self, seed: int, fingerprint: str, size: int) -> None:
        self.size = size
        self._seed = seed_of(seed, fingerprint, "order")
        bits = (size - 1).bit_length()
        self._high, self._low = bits // 2, bits - bits // 2
        self._keys = np.array([seed_of(seed, fingerprint, "order", r) for r in range(_ROUNDS)], dtype=np.uint64)

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples for global sample numbers (any shape, at least 0): number n is in epoch n // size."""
        if self.size <= _SORTED:
            return self._sorted(numbers.reshape(-1)).reshape(numbers.shape)
        epochs, places = np.divmod(numbers.astype(np.uint64).reshape(-1), np.uint64(self.size))
        keys = mix(self._keys[:, None] + epochs)
        found = self._permuted(places, keys)
        while (past := np.flatnonzero(found >= self.size)).size:
            found[past] = self._permuted(found[past], keys[:, past])
        return found.astype(np.int64).reshape(numbers.shape)

    def _sorted(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        epochs, places = np.divmod(numbers, self.size)
        known, rows = np.unique(epochs, return_inverse=True)
        found = words(row_keys(self._seed, known)[:, None], np.arange(self.size))
        orders: NDArray[np.int64] = np.argsort(found, axis=1, kind="stable")[rows, places]
        return orders

    def _permuted(self, values: Words, keys: Words) -> Words:
        """One pass through the network. Each round adds a hash of one half to the other, then they change places."""
        low = np.uint64(self._low)
        left, right = values >> low, values & np.uint64((1 << self._low) - 1)
        widths = (self._high, self._low) * (_ROUNDS // 2)
        for width, key in zip(widths, keys, strict=True):
            left, right = right, left ^ (mix(right ^ key) >> np.uint64(64 - width))
        # After an even number of rounds the halves are in their places again.
        return (left << low) | right
