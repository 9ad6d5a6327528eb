"""Windows of text: which tokens of a source a sample is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.data.sampler import philox_key
from engine.data.tokenizer import END_OF_TEXT_ID
from engine.data.tokens import TokenFile
from engine.errors import DataError

RANDOM_SAMPLES = 1 << 48
"""Samples of the random source: more than any run reads."""
_SCAN_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How text is cut into windows: one starts every `stride` tokens and shares its last `overlap` with the next.

    `specials` are the positions of a sample that are no text, `shortest` is the least that a window may hold, tokens.
    """

    seq_len: int
    specials: int
    overlap: int
    shortest: int

    @property
    def stride(self) -> int:
        """Tokens from the start of a window to the start of the next."""
        return self.seq_len - self.specials

    @property
    def width(self) -> int:
        """Tokens in a full window."""
        return self.stride + self.overlap


class Windows(Protocol):
    """Random access to windows."""

    @property
    def num_windows(self) -> int:
        """Windows there are."""
        ...

    def window(self, index: int) -> NDArray[np.int64]:
        """Tokens of window `index`: int64, at least `shortest` and at most `width` of them."""
        ...


class FileWindows:
    """Full windows of a token file; those that lie across a document's end hold the end-of-text token.

    Raises DataError 411 when the file is shorter than one window.
    """

    def __init__(self, file: TokenFile, cut: Cut) -> None:
        extra = cut.width - cut.seq_len
        if not cut.shortest <= cut.width <= file.count:
            legal = max(cut.shortest, min(cut.width, file.count)) - extra
            raise DataError.of(
                411,
                "data.seq_len",
                cut.seq_len,
                f"one sample needs data.seq_len {'+' if extra >= 0 else '-'} {abs(extra)} = {cut.width} tokens "
                f"(at least {cut.shortest}), {file.path} has {file.count}",
                f"Nearest legal: data.seq_len={legal}; or give a larger corpus",
            )
        self._tokens, self._cut = np.asarray(file.tokens), cut
        self.num_windows = (file.count - cut.overlap) // cut.stride

    def window(self, index: int) -> NDArray[np.int64]:
        """Tokens of window `index`: int64 (width,)."""
        start = index * self._cut.stride
        return self._tokens[start : start + self._cut.width].astype(np.int64)


class DocumentWindows:
    """Windows that end with their document: the last one of each may be short, and is left out below `shortest`.

    The file is read once (about 1 GB/s) to find the documents. `with_end` counts the end-of-text token as text.
    Raises DataError 418 when no document is long enough.
    """

    def __init__(self, file: TokenFile, cut: Cut, *, with_end: bool) -> None:
        found = _ends(file.tokens)
        starts = np.concatenate([[0], found + 1])
        self._stops = np.concatenate([found + with_end, [file.count]])
        self._starts = starts
        fitting = (self._stops - starts - cut.shortest) // cut.stride + 1
        self._until = np.cumsum(np.maximum(fitting, 0))
        self.num_windows = int(self._until[-1])
        if self.num_windows == 0:
            raise DataError.of(
                418,
                "data.variable_length",
                True,
                f"no document of {file.path} has the {cut.shortest} tokens that a sample needs",
                "Use data.variable_length=false, or give a corpus of longer documents",
            )
        self._tokens, self._cut = np.asarray(file.tokens), cut

    def window(self, index: int) -> NDArray[np.int64]:
        """Tokens of window `index`: int64, all of one document."""
        document = int(np.searchsorted(self._until, index, side="right"))
        before = int(self._until[document - 1]) if document else 0
        start = int(self._starts[document]) + (index - before) * self._cut.stride
        stop = min(start + self._cut.width, int(self._stops[document]))
        return self._tokens[start:stop].astype(np.int64)


def _ends(tokens: NDArray[np.uint16] | NDArray[np.uint32]) -> NDArray[np.int64]:
    """Positions of the end-of-text tokens, read in blocks."""
    blocks = range(0, len(tokens), _SCAN_TOKENS)
    return np.concatenate([np.flatnonzero(tokens[b : b + _SCAN_TOKENS] == END_OF_TEXT_ID) + b for b in blocks])


class RandomWindows:
    """Uniformly random tokens, a pure function of (seed, stream, window); needs no files.

    Tokens lie in `first` .. `vocab_size` - 1. With `variable_length` lengths are uniform over `shortest` .. `width`.
    Philox is counter-based: the window's number is the counter's high word, so any window costs the same to reach.
    """

    num_windows = RANDOM_SAMPLES

    def __init__(self, seed: int, stream: int, cut: Cut, *, first: int, vocab_size: int, variable_length: bool) -> None:
        self._key = philox_key(seed, stream)
        self._cut, self._first, self._range = cut, first, np.uint64(vocab_size - first)
        self._lengths = np.uint64(cut.width - cut.shortest + 1) if variable_length else np.uint64(1)
        self._shortest = cut.shortest if variable_length else cut.width

    def window(self, index: int) -> NDArray[np.int64]:
        """Tokens of window `index`: int64."""
        counter = np.array([0, 0, 0, index], dtype=np.uint64)
        words = np.random.Philox(key=self._key, counter=counter).random_raw(self._cut.width + 1)
        length = self._shortest + int(words[-1] % self._lengths)
        return self._first + (words[:length] % self._range).astype(np.int64)
