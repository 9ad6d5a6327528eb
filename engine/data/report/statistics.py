"""Numbers about prepared documents and about the samples that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.schema_data import DataConfig
from engine.data.build.cache import SPLITS, entries, read_meta
from engine.data.samples.stream import Positions, Stream
from engine.data.storage.indexed import IndexedFile

_BLOCK = 1 << 18
QUANTILES = (50, 90, 99)


@dataclass(frozen=True)
class Part:
    """The documents of one split of one source. `share`: of the samples that come from the source."""

    source: str
    share: float
    split: str
    folder: Path
    stream: Stream

    @cached_property
    def lengths(self) -> Positions:
        """Tokens of each document: int64 (documents,)."""
        return np.diff(self.stream.starts)

    def document(self, number: int) -> Positions:
        """Tokens of a document of this part, int64."""
        start, stop = self.stream.starts[number : number + 2]
        return self.tokens(start, stop - start)

    def tokens(self, start: int, length: int) -> Positions:
        """`length` tokens from position `start` on, int64."""
        out = np.empty((1, length), dtype=np.int64)
        self.stream.read(out, np.array([start]), np.array([length]))
        return out[0]


def parts_of(cfg: DataConfig) -> list[Part]:
    """All splits of all sources, in the order train, valid, test. Raises DataError 412, 413, 430 to 437."""
    found = [(folder, share, read_meta(folder)) for folder, share in entries(cfg)]
    return [
        Part(meta["source"], share, split, folder, _stream(folder, meta["prefix"], split))
        for split in SPLITS
        for folder, share, meta in found
        if split in meta["splits"]
    ]


def _stream(folder: Path, prefix: str | None, split: str) -> Stream:
    if prefix is None:
        return Stream(IndexedFile.open(folder / split, "data.cache_dir"))
    return Stream(IndexedFile.open(Path(prefix)), np.load(folder / f"{split}.documents.npy"))


def length_statistics(lengths: Positions, seq_len: int) -> dict[str, Any]:
    """Tokens of documents: min, mean, percentiles, max; `longer`: share of the documents longer than `seq_len`."""
    quantiles = np.percentile(lengths, QUANTILES, method="higher")
    return {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        **{f"p{q}": int(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "max": int(lengths.max()),
        "longer": float((lengths > seq_len).mean()),
    }


def token_counts(parts: Sequence[Part], vocab_size: int, most: int) -> Positions:
    """How often each id occurs, int64 (vocab_size,), in all tokens, or in `most` of them in blocks spread evenly."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    total = sum(part.stream.num_tokens for part in parts)
    for part in parts:
        size = part.stream.num_tokens
        wanted = size if total <= most else int(most * (size / total))
        blocks = -(-wanted // _BLOCK)
        for number in range(blocks):
            length = wanted * (number + 1) // blocks - wanted * number // blocks
            found = np.bincount(part.tokens(size * number // blocks, length), minlength=vocab_size)
            counts += found[:vocab_size]
    return counts


@dataclass(frozen=True, slots=True)
class Shares:
    """What the positions of rows are: `text` is read and not predicted, `predicted`, or `padding`; they add up to 1."""

    text: float
    predicted: float
    padding: float


def position_shares(predicted_BS: NDArray[np.bool_], lengths_B: Positions) -> Shares:
    """`predicted_BS`: where a label is; `lengths_B`: positions before the padding."""
    size = predicted_BS.size
    inside = np.arange(predicted_BS.shape[1]) < lengths_B[:, None]
    predicted = int((predicted_BS & inside).sum())
    used = int(inside.sum())
    return Shares(text=(used - predicted) / size, predicted=predicted / size, padding=(size - used) / size)


def spread(count: int, most: int, seed: int) -> Positions:
    """All of `count` numbers, or `most` of them chosen at random, ascending; int64."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size=most, replace=False))
