"""BERT's samples (Devlin et al., arXiv 1810.04805): masked tokens, and pairs of segments with a class.

Everything random about a sample is a pure function of (data.seed, split, global sample number). In another epoch the
same text has another number, hence other masks, segments and partners.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.config.enums import SentenceHead
from engine.config.schema import ModelConfig
from engine.data.dataset import Row
from engine.data.sampler import philox_key
from engine.data.tokenizer import END_OF_TEXT_ID, unused_entries
from engine.data.windows import Windows
from engine.model.batch import IGNORE

FIRST_RANDOM_TOKEN = 4
"""With random tokens: 0 is padding, 1 to 3 are [CLS], [SEP], [MASK], and text starts here."""
_STREAM = 1 << 63
"""Sets the counters apart from those of sample orders and random tokens, which may have the same key."""


@dataclass(frozen=True, slots=True)
class MaskedVocabulary:
    """Ids of BERT's special tokens, and `text`, int64: the ids that text is made of, the only ones ever masked.

    Padding is the end-of-text token, as in GPT-2.
    """

    size: int
    cls: int
    sep: int
    mask: int
    text: NDArray[np.int64]

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> MaskedVocabulary:
        """[CLS], [SEP] and [MASK] take entries that occur in no text, so that both families share one tokenizer."""
        unused, size = unused_entries(tokenizer), tokenizer.get_vocab_size()
        text = np.setdiff1d(np.arange(size), [END_OF_TEXT_ID, *unused])
        return cls(size, unused[0], unused[1], unused[2], text)

    @classmethod
    def of_random(cls, size: int) -> MaskedVocabulary:
        """For random tokens below `size`."""
        return cls(size, 1, 2, 3, np.arange(FIRST_RANDOM_TOKEN, size))


def makes_pairs(model: ModelConfig) -> bool:
    """Whether samples have two segments: a sentence head or segment embeddings want them."""
    return model.sentence_head is not SentenceHead.none or model.token_types > 1


class MaskedSamples:
    """[CLS] A [SEP], or [CLS] A [SEP] B [SEP] with a random border between the segments; some tokens are masked.

    next_sentence: in half of the samples B comes from another window, class 1; the true continuation is class 0.
    sentence_order (Lan et al., arXiv 1909.11942): in half of the samples A and B are swapped, class 1.
    `mask_rate` of the text tokens, rounded and at least one, have a label: 80 % of them become [MASK], 10 % a random
    token, and 10 % stay (section 3.1).
    """

    causal = False

    def __init__(
        self, windows: Windows, vocabulary: MaskedVocabulary, model: ModelConfig, mask_rate: float, key: tuple[int, int]
    ) -> None:
        """`key`: data.seed and the number of the split."""
        self._windows, self._vocabulary, self._rate = windows, vocabulary, mask_rate
        self._seed, stream = key
        self._counter = np.array([0, 0, 0, _STREAM | stream], dtype=np.uint64)
        self._pairs, self._types, self._head = makes_pairs(model), model.token_types > 1, model.sentence_head
        self._is_text = np.zeros(vocabulary.size, dtype=bool)
        self._is_text[vocabulary.text] = True
        self._cls, self._sep = (np.array([token]) for token in (vocabulary.cls, vocabulary.sep))

    @property
    def num_samples(self) -> int:
        """Samples there are."""
        return self._windows.num_windows

    def row(self, index: int, number: int) -> Row:
        """Sample `index` of the corpus with the random choices of global sample `number`."""
        philox = np.random.Philox(key=philox_key(self._seed, number), counter=self._counter)
        text = self._windows.window(index)
        sentence, parts = None, [self._cls, text, self._sep]
        if self._pairs:
            a, b, sentence = self._segments(text, index, *philox.random_raw(4).tolist())
            parts = [self._cls, a, self._sep, b, self._sep]
        tokens = np.concatenate(parts)
        types = None
        if self._types:
            types = (np.arange(len(tokens)) >= 2 + len(parts[1])).astype(np.int64)
        return Row(*self._masked(tokens, philox), types, sentence)

    def _segments(
        self, text: NDArray[np.int64], index: int, border: int, coin: int, partner: int, place: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], int | None]:
        """A, B and the class, from four random words."""
        border = 1 + border % (len(text) - 1)
        a, b = text[:border], text[border:]
        if self._head is SentenceHead.none:
            return a, b, None
        if coin & 1 == 0:
            return a, b, 0
        if self._head is SentenceHead.sentence_order:
            return b, a, 1
        partner %= self._windows.num_windows - 1
        other = self._windows.window(partner + (partner >= index))
        length = min(len(b), len(other))
        start = place % (len(other) - length + 1)
        return a, other[start : start + length], 1

    def _masked(
        self, tokens: NDArray[np.int64], philox: np.random.Philox
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`tokens` with some replaced, and the labels."""
        labels = np.full_like(tokens, IGNORE)
        candidates = np.flatnonzero(self._is_text[tokens])
        count = min(max(1, int(self._rate * len(candidates) + 0.5)), len(candidates))
        if count == 0:
            return tokens, labels
        words = philox.random_raw(len(candidates) + 2 * count)
        order, action, replacement = words[: -2 * count], words[-2 * count : -count] % np.uint64(10), words[-count:]
        chosen = np.sort(candidates[np.argpartition(order, count - 1)[:count]])
        labels[chosen] = tokens[chosen]
        text = self._vocabulary.text
        random = text[replacement % np.uint64(len(text))]
        kept_or_random = np.where(action == 8, random, tokens[chosen])
        tokens[chosen] = np.where(action < 8, self._vocabulary.mask, kept_or_random)
        return tokens, labels
