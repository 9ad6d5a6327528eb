"""Samples: rows of tokens and labels. Here those of a language model; `engine.data.samples.masked` has BERT's.

Rows are read B at a time, the rows of a micro-batch. S positions: the longest row's, or data.seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.data.samples.infill import Infill
from engine.data.samples.stream import Positions
from engine.data.samples.windows import Windows
from engine.model.batch import IGNORE


@dataclass(frozen=True, slots=True)
class Rows:
    """B samples, padded to the longest or to data.seq_len.

    Past its `lengths[r]` positions row r holds padding: the end token, `IGNORE`, type 0. `types` (B, S) are BERT's
    segments, `sentences` (B,) its classes. `starts`, (B, S): where a document begins after the row's first position;
    None: what comes before is seen.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: Positions
    types: NDArray[np.int64] | None = None
    sentences: NDArray[np.int64] | None = None
    starts: NDArray[np.bool_] | None = None


class Samples(Protocol):
    """Random access to samples. `causal`: no position reads a later one, so padding at the end changes nothing.

    `masked`: rows come with `starts`. `known_length`: positions of the rows, where it takes no reading to know that
    all have equally many, or that only unseen padding makes them so. Otherwise None.
    """

    causal: bool
    masked: bool
    known_length: int | None

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        ...

    def read(self, indices: Positions, numbers: Positions) -> Rows:
        """Samples `indices` of the corpus, read as global samples `numbers`, which all that is random depends on."""
        ...


def pad(rows: NDArray[np.int64], lengths: Positions, fill: int) -> None:
    """Write `fill` past the end of each row of `rows`."""
    if int(lengths.min()) < rows.shape[1]:
        rows[np.arange(rows.shape[1]) >= lengths[:, None]] = fill


class NextTokenSamples:
    """The tokens of a window but the last, each labelled with the token after it.

    With `masked` a document's last token has no label, because what follows is of another document. With `infill`
    documents are rearranged first. What the window before predicts already has no label.
    """

    causal = True

    def __init__(self, windows: Windows, end: int, seq_len: int, *, masked: bool, infill: Infill | None) -> None:
        self._windows, self._end, self._infill, self.masked = windows, end, infill, masked
        self.known_length = seq_len if windows.fixed else None

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        return self._windows.num_windows

    def read(self, indices: Positions, numbers: Positions) -> Rows:
        """Samples `indices`; only a rearrangement depends on `numbers`."""
        text = self._windows.read(indices)
        if self._infill is not None:
            text = self._infill.rearranged(text, numbers)
        lengths = text.lengths - 1
        width = int(lengths.max())
        tokens, labels = text.tokens[:, :width].copy(), text.tokens[:, 1 : width + 1].copy()
        starts = None
        if self.masked:
            starts = np.zeros(tokens.shape, dtype=np.bool_)
            if text.starts is not None:
                starts |= text.starts[:, :width]
                labels[text.starts[:, 1 : width + 1]] = IGNORE
        if text.context.any():
            labels[np.arange(width) < text.context[:, None]] = IGNORE
        if self.known_length is None:
            pad(tokens, lengths, self._end)
            pad(labels, lengths, IGNORE)
        return Rows(tokens, labels, lengths, starts=starts)
