"""Samples: fixed windows of tokens. Window i and its labels, the same window one token later, overlap by design."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.data.sampler import philox_key
from engine.data.tokens import TokenFile
from engine.errors import DataError

RANDOM_SAMPLES = 1 << 48
"""Samples of the random source: more than any run reads."""


class Samples(Protocol):
    """Random access to samples of seq_len + 1 tokens."""

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        ...

    def window(self, index: int) -> NDArray[np.int64]:
        """Tokens of sample `index`: int64 (seq_len + 1,)."""
        ...


class TokenSamples:
    """Sample i of a token file is tokens i*seq_len ... i*seq_len + seq_len, the last one being a label only.

    There are (count - 1) // seq_len of them; each token but the first is predicted at most once per epoch.
    Raises DataError 411 when the file is shorter than one sample.
    """

    def __init__(self, file: TokenFile, seq_len: int) -> None:
        if not 1 <= seq_len <= file.count - 1:
            legal = max(1, min(seq_len, file.count - 1))
            raise DataError.of(
                411,
                "data.seq_len",
                seq_len,
                f"one sample needs data.seq_len + 1 = {seq_len + 1} tokens (at least 2), {file.path} has {file.count}",
                f"Nearest legal: data.seq_len={legal}; or give a larger corpus",
            )
        self._tokens = file.tokens
        self._seq_len = seq_len
        self.num_samples = (file.count - 1) // seq_len

    def window(self, index: int) -> NDArray[np.int64]:
        """Tokens of sample `index`: int64 (seq_len + 1,)."""
        start = index * self._seq_len
        return self._tokens[start : start + self._seq_len + 1].astype(np.int64)


class RandomSamples:
    """Uniformly random tokens below `vocab_size`, a pure function of (seed, stream, sample); needs no files.

    Philox is counter-based: the sample number is the counter's high word, so any sample costs the same to reach.
    """

    num_samples = RANDOM_SAMPLES

    def __init__(self, seed: int, stream: int, vocab_size: int, seq_len: int) -> None:
        self._key = philox_key(seed, stream)
        self._vocab_size = vocab_size
        self._seq_len = seq_len

    def window(self, index: int) -> NDArray[np.int64]:
        """Tokens of sample `index`: int64 (seq_len + 1,)."""
        counter = np.array([0, 0, 0, index], dtype=np.uint64)
        words = np.random.Philox(key=self._key, counter=counter).random_raw(self._seq_len + 1)
        return (words % np.uint64(self._vocab_size)).astype(np.int64)
