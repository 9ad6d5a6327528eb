"""Which replica reads which sample: pure functions of the seed and the step, with no state to save or restore.

Two maps in a row. `sample_numbers` gives every row of every step a global sample number, 0, 1, 2, ... without gaps.
`shuffled` maps a global sample number to a sample of the corpus. Neither depends on the layout: with the global batch
G = micro_batch * accum_steps * dp fixed, step b always trains on the samples numbered b * G ... b * G + G - 1.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_UINT64 = (1 << 64) - 1


def sample_numbers(
    batch_index: int, micro_index: int, *, dp_rank: int, dp: int, micro_batch: int, accum_steps: int
) -> range:
    """Global sample numbers of one micro-batch of one replica.

    Row r of micro-batch m on replica d in global batch b reads sample number b*G + (m*dp + d)*micro_batch + r, with
    G = micro_batch * accum_steps * dp. All tensor-parallel ranks and pipeline stages of a replica read the same rows.

    Raises ValueError when `dp_rank` or `micro_index` is out of range.
    """
    if not 0 <= dp_rank < dp or not 0 <= micro_index < accum_steps:
        raise ValueError(f"dp_rank {dp_rank} of {dp}, micro_index {micro_index} of {accum_steps}")
    global_batch = micro_batch * accum_steps * dp
    start = batch_index * global_batch + (micro_index * dp + dp_rank) * micro_batch
    return range(start, start + micro_batch)


@lru_cache(maxsize=1)
def permutation(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """The order of samples in one epoch: int64 (num_samples,), read-only. The last one is cached.

    Sorts raw Philox words (Salmon et al., SC 2011) keyed on (seed, epoch). Their stream is fixed for good, whereas
    `numpy.random.Generator.permutation` may change between numpy versions.
    """
    keys = np.random.Philox(key=philox_key(seed, epoch)).random_raw(num_samples)
    order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


def shuffled(seed: int, num_samples: int, number: int) -> int:
    """Sample of the corpus for global sample `number`: epoch number // num_samples, each sample once per epoch."""
    epoch, position = divmod(number, num_samples)
    return int(permutation(seed, epoch, num_samples)[position])


def philox_key(first: int, second: int) -> NDArray[np.uint64]:
    """A 128-bit Philox key from two integers, each taken modulo 2**64."""
    return np.array([first & _UINT64, second & _UINT64], dtype=np.uint64)
