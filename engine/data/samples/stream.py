"""The documents of a split as one stream of tokens, wherever they lie in the file."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.data.storage.indexed import IndexedFile

Positions = NDArray[np.int64]


class Stream:
    """The documents `numbers` of `file`, or all of them, one after another.

    `num_tokens` is the stream's length. All positions are in the stream, tokens.
    """

    def __init__(self, file: IndexedFile, numbers: Positions | None = None) -> None:
        self._file, self._numbers = file, numbers
        # A plain array: slicing a memory map costs a Python call of its own.
        self._tokens = np.asarray(file.tokens)
        self._in_order = numbers is None and file.contiguous
        self.num_tokens = file.num_tokens if self._in_order else int(self._pieces[0][-1])

    @property
    def path(self) -> Path:
        """The file's prefix, for messages."""
        return self._file.prefix

    @property
    def num_documents(self) -> int:
        """Documents of the stream."""
        return self._file.num_documents if self._numbers is None else len(self._numbers)

    @cached_property
    def starts(self) -> Positions:
        """Where each document begins, and the stream's end: int64 (num_documents + 1,)."""
        if self._in_order:
            return self._file.document_starts
        sequences = np.concatenate([[0], np.cumsum(self._sequences)])
        return self._pieces[0][sequences]

    @cached_property
    def first_parts(self) -> Positions:
        """Tokens of the first sequence of each document: int64 (num_documents,)."""
        return self._file.lengths[self._first_sequences].astype(np.int64)

    @property
    def parts(self) -> Positions:
        """Sequences of each document: int64 (num_documents,)."""
        return self._sequences

    def ended(self, end: int) -> Positions:
        """1 for each document whose last token is `end`, else 0: int64 (num_documents,). Reads a token of each."""
        sizes = np.minimum(np.diff(self.starts), 1)
        lasts = np.empty((self.num_documents, 1), dtype=np.int64)
        self.read(lasts, self.starts[1:] - sizes, sizes)
        return sizes * (lasts[:, 0] == end)

    def read(self, out: NDArray[np.int64], starts: Positions, lengths: Positions) -> None:
        """Copy `lengths[r]` tokens from position `starts[r]` on into the beginning of row r of `out`."""
        if self._in_order:
            for row, start, length in zip(out, starts.tolist(), lengths.tolist(), strict=True):
                row[:length] = self._tokens[start : start + length]
            return
        ends, places = self._pieces
        pieces = np.searchsorted(ends, starts, side="right") - 1
        for row, start, length, piece in zip(out, starts.tolist(), lengths.tolist(), pieces.tolist(), strict=True):
            self._gather(row, start, length, piece, ends, places)

    def _gather(
        self, row: NDArray[np.int64], start: int, length: int, piece: int, borders: Positions, places: Positions
    ) -> None:
        done = 0
        while done < length:
            begin, stop = start + done, min(start + length, int(borders[piece + 1]))
            place = int(places[piece]) + begin - int(borders[piece])
            row[done : done + stop - begin] = self._tokens[place : place + stop - begin]
            done, piece = stop - start, piece + 1

    @cached_property
    def _documents(self) -> Positions:
        return np.arange(self._file.num_documents) if self._numbers is None else np.asarray(self._numbers)

    @cached_property
    def _first_sequences(self) -> Positions:
        return self._file.documents[self._documents]

    @cached_property
    def _sequences(self) -> Positions:
        return self._file.documents[self._documents + 1] - self._first_sequences

    @cached_property
    def _pieces(self) -> tuple[Positions, Positions]:
        """Where the sequences begin in the stream (with the stream's end), and in the file, tokens."""
        counts = self._sequences
        until = np.cumsum(counts)
        sequences = np.arange(int(until[-1]) if len(until) else 0) + np.repeat(
            self._first_sequences - (until - counts), counts
        )
        borders = np.concatenate([[0], np.cumsum(self._file.lengths[sequences], dtype=np.int64)])
        return borders, self._file.pointers[sequences] // self._tokens.itemsize
