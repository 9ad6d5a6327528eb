"""Micro-batches for one data-parallel replica. Shape suffixes: B rows of a micro-batch, S positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data.dataset import Row, Samples
from engine.data.sampler import sample_numbers
from engine.data.tokenizer import END_OF_TEXT_ID
from engine.model.batch import IGNORE, Batch


@dataclass(frozen=True, slots=True)
class Split:
    """Samples in a fixed order. `index_of` maps a global sample number, which has no end, to a sample.

    `finite`: numbers past the last sample give rows without targets, so that each sample counts at most once.
    """

    samples: Samples
    index_of: Callable[[int], int]
    finite: bool

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self.samples.num_samples

    def num_batches(self, global_batch: int) -> int:
        """Global batches that read every sample; the last one may hold fewer than `global_batch` of them."""
        return -(-self.num_samples // global_batch)

    def micro_batches(
        self, batch_index: int, *, dp_rank: int, dp: int, micro_batch: int, accum_steps: int, multiple: int = 1
    ) -> Iterator[Batch]:
        """The `accum_steps` micro-batches of `micro_batch` rows that replica `dp_rank` reads in one global batch.

        A pure function of its arguments: resuming at step n means calling it with batch_index n. Rows are padded to
        the longest of their micro-batch, rounded up to a multiple of `multiple`, which other ranks share evenly.
        """
        for micro_index in range(accum_steps):
            numbers = sample_numbers(
                batch_index, micro_index, dp_rank=dp_rank, dp=dp, micro_batch=micro_batch, accum_steps=accum_steps
            )
            yield _collate([self._row(number) for number in numbers], numbers, multiple, causal=self.samples.causal)

    def _row(self, number: int) -> Row:
        row = self.samples.row(self.index_of(number), number)
        return row.without_targets() if self.finite and number >= self.num_samples else row


def _collate(rows: Sequence[Row], numbers: range, multiple: int, *, causal: bool) -> Batch:
    lengths = [len(row.tokens) for row in rows]
    length = -(-max(lengths) // multiple) * multiple
    types = [row.types for row in rows if row.types is not None]
    sentences = [row.sentence for row in rows if row.sentence is not None]
    return Batch(
        tokens_BS=_padded([row.tokens for row in rows], length, END_OF_TEXT_ID),
        labels_BS=_padded([row.labels for row in rows], length, IGNORE),
        samples_B=torch.tensor(numbers),
        lengths_B=None if causal or min(lengths) == length else torch.tensor(lengths),
        token_types_BS=_padded(types, length, 0) if types else None,
        sentence_B=torch.tensor(sentences) if sentences else None,
    )


def _padded(rows: Sequence[NDArray[np.int64]], length: int, fill: int) -> Tensor:
    out = np.full((len(rows), length), fill, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(out)
