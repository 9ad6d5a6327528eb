"""Fill-in-the-middle: documents rearranged so that a causal model learns to fill gaps (Bavarian et al., 2207.14255)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.data.samples.draws import row_keys, shares, words
from engine.data.samples.stream import Positions
from engine.data.samples.windows import Text

_WORDS = 4
"""Random words of a piece: whether, which form, two cuts."""


class Infill:
    """Rearranges each piece of a document in a window with probability `rate`, half of them in either form.

    PSM: <PRE> prefix <SUF> suffix <MID> middle. SPM, the paper's second variant: <PRE> <SUF> suffix <MID> prefix
    middle. The cuts are two uniformly random places between tokens. A piece's end token stays its last. Windows grow
    by three tokens for each rearranged piece and are cut to their width again, as StarCoder does (2305.06161). All is
    a function of `seed` and the sample's number.
    """

    def __init__(self, rate: float, marks: tuple[int, int, int], end: int, seed: np.uint64) -> None:
        """`marks`: ids of <PRE>, <MID> and <SUF>, in this order."""
        self._rate, self._end, self._seed = rate, end, seed
        self._pre, self._mid, self._suf = (np.array([mark]) for mark in marks)

    def rearranged(self, text: Text, numbers: Positions) -> Text:
        """The windows of global samples `numbers`."""
        keys = row_keys(self._seed, numbers)
        rows, width = text.tokens.shape
        tokens, starts = np.empty_like(text.tokens), np.zeros((rows, width), dtype=np.bool_)
        lengths = np.empty_like(text.lengths)
        for row in range(rows):
            borders = [0] if text.starts is None else [0, *np.flatnonzero(text.starts[row]).tolist()]
            lengths[row] = self._row(
                text.tokens[row, : text.lengths[row]], borders, keys[row : row + 1], tokens[row], starts[row]
            )
        return Text(tokens, lengths, text.context, None if text.starts is None else starts)

    def _row(
        self,
        window: NDArray[np.int64],
        borders: list[int],
        key: NDArray[np.uint64],
        out: NDArray[np.int64],
        starts: NDArray[np.bool_],
    ) -> int:
        """Fill `out` and `starts`, and return the row's length."""
        found = words(key, np.arange(_WORDS * len(borders))).reshape(-1, _WORDS)
        chosen = (shares(found[:, 0]) < self._rate).tolist()
        done = 0
        for number, (begin, stop) in enumerate(zip(borders, [*borders[1:], len(window)], strict=True)):
            if done == len(out):
                break
            starts[done] = done > 0
            piece = window[begin:stop]
            if chosen[number]:
                piece = self._infilled(piece, found[number])
            kept = min(len(piece), len(out) - done)
            out[done : done + kept] = piece[:kept]
            done += kept
        return done

    def _infilled(self, piece: NDArray[np.int64], found: NDArray[np.uint64]) -> NDArray[np.int64]:
        ended = len(piece) > 0 and int(piece[-1]) == self._end
        body, tail = (piece[:-1], piece[-1:]) if ended else (piece, piece[:0])
        first, second = sorted((found[2:] % np.uint64(len(body) + 1)).tolist())
        prefix, middle, suffix = body[:first], body[first:second], body[second:]
        if found[1] & np.uint64(1):
            order = [self._pre, prefix, self._suf, suffix, self._mid, middle, tail]
        else:
            order = [self._pre, self._suf, suffix, self._mid, prefix, middle, tail]
        return np.concatenate(order)
