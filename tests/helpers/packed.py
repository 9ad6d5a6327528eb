"""Rows made of several documents, and the same documents one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.config import ModelConfig
from engine.model.batch import IGNORE, Batch, Documents
from tests.helpers.models import tokens_of


def packed_batch(
    cfg: ModelConfig, lengths: Sequence[Sequence[int]], *, first: int = 0, padding: Sequence[int] | None = None
) -> Batch:
    """One row for each of `lengths`, with documents that long, then `padding` (none); samples from `first` on."""
    padding = [0] * len(lengths) if padding is None else padding
    pieces = [[*row, fill] if fill else list(row) for row, fill in zip(lengths, padding, strict=True)]
    tokens_BS = tokens_of(cfg, len(pieces), sum(pieces[0]), seed=first)
    labels_BS = tokens_BS.roll(-1, dims=1)
    for labels, row, fill in zip(labels_BS, pieces, padding, strict=True):
        assert sum(row) == len(labels), "rows are equally long"
        labels[torch.tensor(row).cumsum(0) - 1] = IGNORE
        labels[len(labels) - fill :] = IGNORE
    flat = [length for row in pieces for length in row]
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        samples_B=torch.arange(first, first + len(pieces)),
        documents=Documents(torch.tensor([0, *flat]).cumsum(0).int(), max(flat)),
    )


def documents_alone(batch: Batch) -> list[Batch]:
    """Each document of `batch` as a micro-batch of one row."""
    assert batch.documents is not None
    starts = batch.documents.starts.tolist()
    return [
        Batch(
            tokens_BS=batch.tokens_BS.flatten()[None, start:stop],
            labels_BS=batch.labels_BS.flatten()[None, start:stop],
            samples_B=torch.tensor([number]),
        )
        for number, (start, stop) in enumerate(zip(starts, starts[1:], strict=False))
    ]
