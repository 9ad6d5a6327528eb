"""Samples of records with parts: a prompt and its completion, or one or two texts with a class. B rows, S positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.data.samples.dataset import Rows
from engine.data.samples.masked import Special
from engine.data.samples.packing import pack
from engine.data.samples.stream import Positions, Stream
from engine.errors import DataError
from engine.model.batch import IGNORE


class Completions:
    """Prompt, completion and end token; only the completion and the end are predicted.

    A record of n tokens takes n - 1 positions: nothing is read at its last token. Longer ones lose the beginning of
    the prompt, then, when one token of it is left, the end of the completion; `cut_prompts` and `cut_completions`
    count them. With `masked` a row holds as many records, in order, as fit (`engine.data.samples.packing`), and each
    sees only itself; otherwise one. Rows are padded to `seq_len`, or with `variable_length` to the longest.
    """

    causal = True

    def __init__(self, stream: Stream, end: int, seq_len: int, *, masked: bool, variable_length: bool) -> None:
        """`stream`: documents of two sequences. Raises DataError 463 when none has a token to predict."""
        sizes = np.diff(stream.starts)
        prompts = stream.first_parts
        completions = sizes - prompts
        kept = np.minimum(completions, seq_len + 1 - np.minimum(prompts, 1))
        prompts_kept = np.minimum(prompts, seq_len + 1 - kept)
        self.cut_prompts = int((prompts_kept < prompts).sum())
        self.cut_completions = int((kept < completions).sum())
        records = np.flatnonzero((prompts_kept + kept > 1) & (kept > 0))
        if not records.size:
            rule = f"no record of {stream.path} has a completion to predict"
            raise DataError.of(463, "data.kind", "completion", rule, "Give records with text in both fields")
        self._begins = (stream.starts[:-1] + prompts - prompts_kept)[records]
        self._prompts, self._tokens = prompts_kept[records], (prompts_kept + kept)[records]
        self._rows = pack(self._tokens - 1, seq_len) if masked else np.arange(len(records) + 1)
        self._stream, self._end, self._seq_len, self.masked = stream, end, seq_len, masked
        self.known_length = None if variable_length else seq_len

    @property
    def num_samples(self) -> int:
        """Rows there are."""
        return len(self._rows) - 1

    def read(self, indices: Positions, numbers: Positions) -> Rows:
        """Rows `indices`; nothing about them is random."""
        firsts, stops = self._rows[indices], self._rows[indices + 1]
        lengths = np.array([int((self._tokens[a:b] - 1).sum()) for a, b in zip(firsts, stops, strict=True)])
        shape = (len(indices), self.known_length or int(lengths.max()))
        tokens, labels = np.full(shape, self._end, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        starts = np.zeros(shape, dtype=np.bool_)
        for row, (first, stop) in enumerate(zip(firsts.tolist(), stops.tolist(), strict=True)):
            records = slice(first, stop)
            text = np.empty((stop - first, int(self._tokens[records].max())), dtype=np.int64)
            self._stream.read(text, self._begins[records], self._tokens[records])
            at = 0
            for record, size, prompt in zip(text, self._tokens[records], self._prompts[records], strict=True):
                unpredicted = max(int(prompt), 1)
                tokens[row, at : at + size - 1] = record[: size - 1]
                labels[row, at + unpredicted - 1 : at + size - 1] = record[unpredicted:size]
                starts[row, at] = at > 0
                at += int(size) - 1
        return Rows(tokens, labels, lengths, starts=starts if self.masked else None)


class Classified:
    """[CLS] text [SEP], or [CLS] text [SEP] pair [SEP], with the class of the sentence head; no token is predicted.

    What is too long loses tokens from the end of its longer text until it fits. Rows are padded to `seq_len`, or with
    `variable_length` to the longest.
    """

    causal = False
    masked = False
    known_length: int | None = None

    def __init__(
        self,
        stream: Stream,
        labels: NDArray[np.float64],
        special: Special,
        seq_len: int,
        *,
        variable_length: bool,
        label_field: str,
    ) -> None:
        """`labels`: of each document, float64. `label_field`: where they come from, for messages.

        Raises DataError: 461 labels that are not integers, 462 other than 0 and 1.
        """
        _require_classes(labels, stream, label_field)
        self._first, self._pairs = stream.first_parts, stream.parts == 2
        self._second = np.diff(stream.starts) - self._first
        self._stream, self._special, self._seq_len = stream, special, seq_len
        self._classes, self._width = labels.astype(np.int64), None if variable_length else seq_len
        self.num_samples = stream.num_documents

    def read(self, indices: Positions, numbers: Positions) -> Rows:
        """Records `indices`; nothing about them is random."""
        pairs, whole = self._pairs[indices], self._first[indices]
        room = self._seq_len - 2 - pairs
        first, second = truncated(whole, self._second[indices], room)
        lengths = first + second + 2 + pairs
        shape = (len(indices), self._width or int(lengths.max()))
        special = self._special
        tokens = np.full(shape, special.end, dtype=np.int64)
        tokens[:, 0] = special.cls
        begins = self._stream.starts[indices]
        for row, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            out, begin = tokens[row : row + 1], begins[row : row + 1]
            self._stream.read(out[:, 1:], begin, first[row : row + 1])
            out[0, 1 + a] = special.sep
            if pairs[row]:
                self._stream.read(out[:, 2 + a :], begin + whole[row], second[row : row + 1])
                out[0, 2 + a + b] = special.sep
        places = np.arange(shape[1])
        types = ((places >= 2 + first[:, None]) & (places < lengths[:, None])).astype(np.int64)
        return Rows(tokens, np.full(shape, IGNORE, dtype=np.int64), lengths, types, self._classes[indices])


def truncated(first: Positions, second: Positions, room: Positions) -> tuple[Positions, Positions]:
    """Lengths of two texts after the longer one, at first the second when equal, lost tokens until both fit `room`."""
    excess = np.maximum(first + second - room, 0)
    longer = np.minimum(excess, np.abs(first - second))
    half = excess - longer
    cut_first = np.where(first > second, longer, 0) + half // 2
    cut_second = np.where(first > second, 0, longer) + (half + 1) // 2
    return first - cut_first, second - cut_second


def _require_classes(labels: NDArray[np.float64], stream: Stream, field: str) -> None:
    way_out = "Give a field with the classes 0 and 1"
    fractions = np.flatnonzero(labels != np.floor(labels))
    if fractions.size:
        rule = f"record {fractions[0]} of {stream.path} has the score {labels[fractions[0]]}, and the model's sentence "
        raise DataError.of(461, "data.label_field", field, f"{rule}head takes class labels", way_out)
    others = np.flatnonzero((labels < 0) | (labels > 1))
    if others.size:
        rule = f"record {others[0]} of {stream.path} has the label {labels[others[0]]:.0f}, and the model's sentence "
        raise DataError.of(462, "data.label_field", field, f"{rule}head has the two classes 0 and 1", way_out)
