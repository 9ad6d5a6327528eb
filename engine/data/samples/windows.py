"""Windows of text: which tokens of a split a sample is made of. B windows at a time, W tokens wide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.data.samples.stream import Positions, Stream
from engine.errors import DataError

RANDOM_SAMPLES = 1 << 48
"""Samples of the random source: more than any run reads."""
_UINT64 = (1 << 64) - 1
_32 = np.uint64(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How text is cut into windows of at most `width` tokens, one every `stride` tokens.

    `shortest`: least tokens of a window. `context`: tokens at a window's start that the window before it predicted.
    """

    seq_len: int
    width: int
    stride: int
    shortest: int
    context: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """B windows. Row r has `lengths[r]` tokens; what follows them is not defined.

    `context`: the first predictions of each row that are not its own. `starts`: where a document begins after the
    row's first token, None when nobody asked or each row is of one document.
    """

    tokens: NDArray[np.int64]
    lengths: Positions
    context: Positions
    starts: NDArray[np.bool_] | None = None


class Windows(Protocol):
    """Random access to windows. `fixed`: all have the cut's full width."""

    fixed: bool

    @property
    def num_windows(self) -> int:
        """Windows there are."""
        ...

    def read(self, indices: Positions) -> Text:
        """The windows `indices`, int64 (B,)."""
        ...


class StreamWindows:
    """Full windows of a stream, whatever documents they lie across; document ends are tokens of the text.

    With `borders` the windows tell where documents begin. Raises DataError 411 when the stream is shorter than one
    window.
    """

    fixed = True

    def __init__(self, stream: Stream, cut: Cut, *, borders: bool = False) -> None:
        extra, count = cut.width - cut.seq_len, stream.num_tokens
        if not cut.shortest <= cut.width <= count:
            legal = max(cut.shortest, min(cut.width, count)) - extra
            nearest = f"Nearest legal: data.seq_len={legal}; or give a larger corpus"
            raise DataError.of(
                411,
                "data.seq_len",
                cut.seq_len,
                f"one sample needs data.seq_len {'+' if extra >= 0 else '-'} {abs(extra)} = {cut.width} tokens "
                f"(at least {cut.shortest}), {stream.path} has {count}",
                nearest if count >= cut.shortest else "Give a larger corpus",
            )
        self._stream, self._cut, self._borders = stream, cut, borders
        self.num_windows = (count - cut.width) // cut.stride + 1

    def read(self, indices: Positions) -> Text:
        """The windows `indices`, tokens (B, width)."""
        cut, rows = self._cut, len(indices)
        begins, lengths = indices * cut.stride, np.full(rows, cut.width)
        tokens = np.empty((rows, cut.width), dtype=np.int64)
        self._stream.read(tokens, begins, lengths)
        context = np.where(indices > 0, cut.context, 0)
        return Text(tokens, lengths, context, self._starts(begins) if self._borders else None)

    def _starts(self, begins: Positions) -> NDArray[np.bool_]:
        found = np.zeros((len(begins), self._cut.width), dtype=np.bool_)
        borders = self._stream.starts
        first = np.searchsorted(borders, begins, side="right").tolist()
        last = np.searchsorted(borders, begins + self._cut.width, side="left").tolist()
        for row, begin, low, high in zip(found, begins.tolist(), first, last, strict=True):
            row[borders[low:high] - begin] = True
        return found


class DocumentWindows:
    """Windows that end with their document: the last one of each may be short, and is left out below `shortest`.

    `without_end`: tokens at the end of each document that are not text, int64 (documents,) or a number.
    Raises DataError 418 when no document is long enough.
    """

    fixed = False

    def __init__(self, stream: Stream, cut: Cut, *, without_end: Positions | int = 0) -> None:
        self._starts, self._stops = stream.starts[:-1], stream.starts[1:] - without_end
        lengths = self._stops - self._starts
        later = np.maximum((lengths - cut.shortest - cut.context) // cut.stride, 0)
        self._until = np.cumsum(np.where(lengths >= cut.shortest, 1 + later, 0))
        self.num_windows = int(self._until[-1]) if len(self._until) else 0
        if self.num_windows == 0:
            raise DataError.of(
                418,
                "data.variable_length",
                True,
                f"no document of {stream.path} has the {cut.shortest} tokens that a sample needs",
                "Use data.variable_length=false, or give a corpus of longer documents",
            )
        self._stream, self._cut = stream, cut

    def read(self, indices: Positions) -> Text:
        """The windows `indices`, tokens (B, width), each of one document."""
        cut = self._cut
        documents = np.searchsorted(self._until, indices, side="right")
        places = indices - np.where(documents > 0, self._until[documents - 1], 0)
        begins = self._starts[documents] + places * cut.stride
        lengths = np.minimum(self._stops[documents] - begins, cut.width)
        tokens = np.empty((len(indices), cut.width), dtype=np.int64)
        self._stream.read(tokens, begins, lengths)
        return Text(tokens, lengths, np.where(places > 0, cut.context, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTokens:
    """What random text is made of: ids `first` .. `vocab_size` - 1, cut into `documents` or not."""

    first: int
    vocab_size: int
    documents: bool = False


class RandomWindows:
    """Uniformly random tokens, a pure function of (seed, stream, window); needs no files.

    With `variable_length` lengths are uniform over `shortest` .. `width`. With documents one ends every seq_len / 4
    tokens on average, with a token like all others: a mark of its own would be a fourth of what is predicted in short
    samples, hence something to learn. Philox (Salmon et al., SC 2011) is counter-based: the window's number is the
    counter's high word, so any window costs the same to reach.
    """

    num_windows = RANDOM_SAMPLES

    def __init__(self, seed: int, stream: int, cut: Cut, tokens: RandomTokens, *, variable_length: bool) -> None:
        self._key = np.array([seed & _UINT64, stream], dtype=np.uint64)
        self._cut, self._kind, self.fixed = cut, tokens, not variable_length
        self._range = np.uint64(tokens.vocab_size - tokens.first)
        self._lengths = np.uint64(cut.width - cut.shortest + 1 if variable_length else 1)
        self._shortest = cut.shortest if variable_length else cut.width

    def read(self, indices: Positions) -> Text:
        """The windows `indices`, tokens (B, width)."""
        width = self._cut.width
        words = np.stack([self._words(index) for index in indices.tolist()])
        lengths = self._shortest + (words[:, -1] % self._lengths).astype(np.int64)
        words = words[:, :-1]
        tokens = self._kind.first + (words % self._range).astype(np.int64)
        context = np.where(indices > 0, self._cut.context, 0)
        if not self._kind.documents:
            return Text(tokens, lengths, context)
        ends = (words >> _32) % np.uint64(max(self._cut.seq_len // 4, 1)) == 0
        starts = np.zeros((len(indices), width), dtype=np.bool_)
        starts[:, 1:] = ends[:, :-1] & (np.arange(1, width) < lengths[:, None])
        return Text(tokens, lengths, context, starts)

    def _words(self, index: int) -> NDArray[np.uint64]:
        counter = np.array([0, 0, 0, index], dtype=np.uint64)
        return np.random.Philox(key=self._key, counter=counter).random_raw(self._cut.width + 1)
