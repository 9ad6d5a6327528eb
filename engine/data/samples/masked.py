"""BERT's samples (Devlin et al., arXiv 1810.04805): masked tokens, and pairs of segments with a class.

Everything random about a sample is a pure function of (data.seed, split, global sample number). In another epoch the
same text has another number, hence other masks, segments and partners. B rows at a time, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.config.enums import SentenceHead
from engine.config.schema import ModelConfig
from engine.data.samples.dataset import Rows, pad
from engine.data.samples.draws import Words, row_keys, words
from engine.data.samples.stream import Positions
from engine.data.samples.windows import Text, Windows
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.model.batch import IGNORE

_PAIR, _ORDER, _ACTION, _TOKEN = (n << 32 for n in range(4))
"""First counters of the words that a row draws: for its pair, and at each position for the order of masking, for what
becomes of a chosen token, and for a random one."""
_NEVER = np.uint64((1 << 64) - 1)
_PLACE_BITS = 20


def makes_pairs(model: ModelConfig) -> bool:
    """Whether samples have two segments: a sentence head or segment embeddings want them."""
    return model.sentence_head is not SentenceHead.none or model.token_types > 1


@dataclass(frozen=True, slots=True)
class Special:
    """Ids of BERT's special tokens."""

    end: int
    cls: int
    sep: int
    mask: int


class Masking:
    """Which tokens are predicted, and what is seen in their places.

    `rate` of a row's text tokens, rounded and at least one, are chosen in random order. With `whole_words` the order
    is one of words, and the last word is masked to its end even where it has more tokens than are left. 80 % of the
    chosen tokens become [MASK], 10 % a random token, and 10 % stay (section 3.1), each token by itself.
    """

    def __init__(self, vocabulary: Vocabulary, special: Special, rate: float, *, whole_words: bool) -> None:
        self._text, self._ids, self._mask = vocabulary.text, np.flatnonzero(vocabulary.text), special.mask
        self._word_start = vocabulary.word_start if whole_words else None
        self._rate = rate

    def apply(self, tokens: NDArray[np.int64], keys: Words) -> NDArray[np.int64]:
        """Mask `tokens` (B, S) in place, and return the labels."""
        labels = np.full_like(tokens, IGNORE)
        rows, places = np.nonzero(self._chosen(tokens, keys))
        wanted, keys = tokens[rows, places], keys[rows]
        labels[rows, places] = wanted
        action = words(keys, _ACTION + places) % np.uint64(10)
        seen = np.where(action < 8, self._mask, wanted)
        random = np.flatnonzero(action == 8)
        drawn = words(keys[random], _TOKEN + places[random])
        seen[random] = self._ids[(drawn % np.uint64(len(self._ids))).astype(np.int64)]
        tokens[rows, places] = seen
        return labels

    def _chosen(self, tokens: NDArray[np.int64], keys: Words) -> NDArray[np.bool_]:
        candidates = self._text[tokens]
        counts = candidates.sum(axis=1)
        wanted = np.minimum(np.maximum((self._rate * counts + 0.5).astype(np.int64), 1), counts)
        order = self._order(tokens, candidates, keys)
        # The word of the last wanted token bounds the chosen ones; its other tokens have the same place in the order.
        last = np.sort(order, axis=1)[np.arange(len(tokens)), np.maximum(wanted - 1, 0)]
        return (order <= last[:, None]) & candidates

    def _order(self, tokens: NDArray[np.int64], candidates: NDArray[np.bool_], keys: Words) -> Words:
        """The place of each token in its row's random order, equal only within a word; uint64 (B, S)."""
        width = tokens.shape[1]
        places = np.arange(width)
        found = words(keys[:, None], _ORDER + places)
        # The lowest bits make them unique.
        found >>= np.uint64(_PLACE_BITS)
        found <<= np.uint64(_PLACE_BITS)
        found |= places.astype(np.uint64)
        if self._word_start is not None:
            begins = self._word_start[tokens]
            begins[:, 1:] |= ~candidates[:, :-1]
            begins[:, 0] = True
            first = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
            found = np.take_along_axis(found, first, axis=1)
        found[~candidates] = _NEVER
        return found


class MaskedSamples:
    """[CLS] A [SEP], or [CLS] A [SEP] B [SEP] with a random border between the segments; some tokens are masked.

    next_sentence: in half of the samples B comes from another window, class 1; the true continuation is class 0.
    sentence_order (Lan et al., arXiv 1909.11942): in half of the samples A and B are swapped, class 1.
    """

    causal = False
    masked = False

    def __init__(
        self,
        windows: Windows,
        special: Special,
        masking: Masking,
        model: ModelConfig,
        *,
        seed: np.uint64,
        seq_len: int,
    ) -> None:
        """`seed`: of all that is random, of data.seed and the split."""
        self._windows, self._special, self._masking, self._seed = windows, special, masking, seed
        self._pairs, self._types, self._head = makes_pairs(model), model.token_types > 1, model.sentence_head
        self._extra = 3 if self._pairs else 2
        self.known_length = seq_len if windows.fixed else None

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        return self._windows.num_windows

    def read(self, indices: Positions, numbers: Positions) -> Rows:
        """Samples `indices` of the corpus with the random choices of global samples `numbers`."""
        keys = row_keys(self._seed, numbers)
        text = self._windows.read(indices)
        types = sentences = None
        if self._pairs:
            tokens, second, lengths, sentences = self._paired(text, indices, keys)
            if self._types:
                places = np.arange(tokens.shape[1])
                types = ((places >= second[:, None]) & (places < lengths[:, None])).astype(np.int64)
        else:
            tokens, lengths = self._single(text)
        labels = self._masking.apply(tokens, keys)
        return Rows(tokens, labels, lengths, types, sentences)

    def _single(self, text: Text) -> tuple[NDArray[np.int64], Positions]:
        lengths, special = text.lengths + self._extra, self._special
        tokens = np.empty((len(lengths), int(lengths.max())), dtype=np.int64)
        tokens[:, 0] = special.cls
        tokens[:, 1:-1] = text.tokens[:, : tokens.shape[1] - 2]
        tokens[np.arange(len(lengths)), lengths - 1] = special.sep
        pad(tokens, lengths, special.end)
        return tokens, lengths

    def _paired(
        self, text: Text, indices: Positions, keys: Words
    ) -> tuple[NDArray[np.int64], Positions, Positions, NDArray[np.int64] | None]:
        """Tokens (B, S); where the second segments begin, rows' lengths and classes, each (B,)."""
        cls, sep = self._special.cls, self._special.sep
        border, coin, partner, place = words(keys[:, None], _PAIR + np.arange(4)).T
        first = 1 + (border % (text.lengths - 1).astype(np.uint64)).astype(np.int64)
        ones = (coin & np.uint64(1)).astype(np.int64)
        classes = None if self._head is SentenceHead.none else ones
        swapped = ones * (self._head is SentenceHead.sentence_order)
        others = self._others(indices, partner, ones) if self._head is SentenceHead.next_sentence else {}
        lengths = text.lengths + self._extra
        tokens = np.full((len(indices), int(lengths.max())), self._special.end, dtype=np.int64)
        tokens[:, 0] = cls
        seconds = []
        for row, (cut, swap) in enumerate(zip(first.tolist(), swapped.tolist(), strict=True)):
            window = text.tokens[row, : text.lengths[row]]
            a, b = (window[cut:], window[:cut]) if swap else (window[:cut], window[cut:])
            if row in others:
                length = min(len(b), len(others[row]))
                start = int(place[row]) % (len(others[row]) - length + 1)
                b = others[row][start : start + length]
            middle, end = 1 + len(a), 2 + len(a) + len(b)
            out = tokens[row]
            out[1:middle], out[middle], out[middle + 1 : end], out[end] = a, sep, b, sep
            lengths[row] = end + 1
            out[end + 1 :] = self._special.end
            seconds.append(middle + 1)
        return tokens[:, : int(lengths.max())], np.array(seconds), lengths, classes

    def _others(self, indices: Positions, partner: Words, ones: Positions) -> dict[int, NDArray[np.int64]]:
        """Another window for each row of class 1."""
        rows = np.flatnonzero(ones)
        if not rows.size:
            return {}
        found = (partner[rows] % np.uint64(self._windows.num_windows - 1)).astype(np.int64)
        text = self._windows.read(found + (found >= indices[rows]))
        return {row: text.tokens[i, : text.lengths[i]] for i, row in enumerate(rows.tolist())}
