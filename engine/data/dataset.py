"""Samples: rows of tokens and labels. Here those of a language model; `engine.data.masked` has BERT's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.data.windows import Windows
from engine.model.batch import IGNORE


@dataclass(frozen=True, slots=True)
class Row:
    """One sample before padding: int64 arrays of one length. `types` are BERT's segments, `sentence` its class."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    types: NDArray[np.int64] | None = None
    sentence: int | None = None

    def without_targets(self) -> Row:
        """The same text with nothing to predict, so that it adds nothing to a loss."""
        sentence = None if self.sentence is None else IGNORE
        return replace(self, labels=np.full_like(self.labels, IGNORE), sentence=sentence)


class Samples(Protocol):
    """Random access to samples. `causal`: no position reads a later one, so padding at the end changes nothing."""

    causal: bool

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        ...

    def row(self, index: int, number: int) -> Row:
        """Sample `index` of the corpus, read as global sample `number`, which what is random about it depends on."""
        ...


class NextTokenSamples:
    """The tokens of a window but the last, each labelled with the token after it."""

    causal = True

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        return self._windows.num_windows

    def row(self, index: int, number: int) -> Row:
        """Sample `index`; nothing about it is random."""
        window = self._windows.window(index)
        return Row(window[:-1], window[1:])
