"""Micro-batches for one data-parallel replica. Shape suffixes: B rows of a micro-batch, S positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data.samples.dataset import Rows, Samples
from engine.data.samples.sampler import sample_numbers
from engine.data.samples.stream import Positions
from engine.model.batch import IGNORE, Batch, Documents


@dataclass(frozen=True, slots=True)
class Split:
    """Samples in a fixed order. `indices_of` maps global sample numbers, which have no end, to samples.

    `finite`: numbers past the last sample give rows without targets, so that each sample counts at most once.
    `end`: the token that fills padding.
    """

    samples: Samples
    indices_of: Callable[[Positions], Positions]
    finite: bool
    end: int

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self.samples.num_samples

    def num_batches(self, global_batch: int) -> int:
        """Global batches that read every sample; the last one may hold fewer than `global_batch` of them."""
        return -(-self.num_samples // global_batch)

    def micro_batches(
        self,
        first_sample: int,
        *,
        dp_rank: int,
        dp: int,
        micro_batch: int,
        accum_steps: int,
        multiple: int = 1,
        read: bool = True,
    ) -> Iterator[Batch]:
        """The `accum_steps` micro-batches of `micro_batch` rows that replica `dp_rank` reads in one global batch.

        A pure function of its arguments. `first_sample` counts the samples that all replicas have read so far: to go
        on after them, in any layout, means to call it with that number. Rows are padded to the longest of their
        micro-batch, rounded up to a multiple of `multiple`, which other ranks share evenly.

        `read=False`, for a stage that neither embeds tokens nor predicts them: the same samples, lengths and
        documents; tokens are zeros, labels `IGNORE`, segments and classes left out. Where lengths and documents need
        no reading, the corpus is not touched.
        """
        place = {"dp_rank": dp_rank, "dp": dp, "micro_batch": micro_batch, "accum_steps": accum_steps}
        numbers = np.array([sample_numbers(first_sample, m, **place) for m in range(accum_steps)], dtype=np.int64)
        known = self.samples.known_length
        if not read and known is not None and not self.samples.masked:
            shape = (micro_batch, _rounded(known, multiple))
            lengths = None if self.samples.causal or known == shape[1] else torch.full((micro_batch,), known)
            for row in numbers:
                yield _blank(shape, torch.from_numpy(row.copy()), lengths, None)
            return
        for row, indices in zip(numbers, self.indices_of(numbers), strict=True):
            batch = self._batch(indices, row, multiple)
            yield batch if read else _blank(batch.tokens_BS.shape, batch.samples_B, batch.lengths_B, batch.documents)

    def _batch(self, indices: Positions, numbers: Positions, multiple: int) -> Batch:
        rows = self.samples.read(indices, numbers)
        if self.finite and int(numbers[-1]) >= self.num_samples:
            rows = _without_targets(rows, numbers >= self.num_samples)
        lengths = rows.lengths
        length = _rounded(rows.tokens.shape[1], multiple)
        padded = not self.samples.causal and int(lengths.min()) < length
        return Batch(
            tokens_BS=_fitted(rows.tokens, length, self.end),
            labels_BS=_fitted(rows.labels, length, IGNORE),
            samples_B=torch.from_numpy(numbers.copy()),
            lengths_B=torch.from_numpy(lengths) if padded else None,
            token_types_BS=None if rows.types is None else _fitted(rows.types, length, 0),
            sentence_B=None if rows.sentences is None else torch.from_numpy(rows.sentences),
            documents=None if rows.starts is None else _documents(rows.starts, lengths, length),
        )


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _fitted(rows: NDArray[np.int64], length: int, fill: int) -> Tensor:
    """`rows` filled up to `length` positions."""
    width = rows.shape[1]
    if width == length:
        return torch.from_numpy(np.ascontiguousarray(rows))
    out = np.full((len(rows), length), fill, dtype=np.int64)
    out[:, :width] = rows
    return torch.from_numpy(out)


def _without_targets(rows: Rows, past: NDArray[np.bool_]) -> Rows:
    """The same text with nothing to predict in the rows `past`, so that they add nothing to a loss."""
    sentences = None if rows.sentences is None else np.where(past, IGNORE, rows.sentences)
    return replace(rows, labels=np.where(past[:, None], IGNORE, rows.labels), sentences=sentences)


def _documents(starts_BS: NDArray[np.bool_], lengths_B: Positions, length: int) -> Documents:
    """Pieces of documents in rows of `length` positions; a row's padding is a piece of its own."""
    rows = len(lengths_B)
    borders = np.zeros((rows, length), dtype=np.bool_)
    borders[:, : starts_BS.shape[1]] = starts_BS
    borders[:, 0] = True
    padded = np.flatnonzero(lengths_B < length)
    borders[padded, lengths_B[padded]] = True
    starts = np.append(np.flatnonzero(borders), rows * length).astype(np.int32)
    return Documents(starts=torch.from_numpy(starts), longest=int(np.diff(starts).max()))


def _blank(shape: tuple[int, ...], samples_B: Tensor, lengths_B: Tensor | None, documents: Documents | None) -> Batch:
    return Batch(
        tokens_BS=torch.zeros(shape, dtype=torch.int64),
        labels_BS=torch.full(shape, IGNORE, dtype=torch.int64),
        samples_B=samples_B,
        lengths_B=lengths_B,
        documents=documents,
    )
