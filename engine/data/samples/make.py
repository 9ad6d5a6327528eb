"""From a split's documents, or from random tokens, to the samples that a model learns from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.config.enums import Family, SampleKind, SentenceHead
from engine.config.schema import ModelConfig
from engine.config.schema_data import DataConfig
from engine.data.samples.dataset import NextTokenSamples, Samples
from engine.data.samples.draws import seed_of
from engine.data.samples.infill import Infill
from engine.data.samples.masked import MaskedSamples, Masking, Special, makes_pairs
from engine.data.samples.pairs import Classified, Completions
from engine.data.samples.stream import Stream
from engine.data.samples.windows import Cut, DocumentWindows, RandomTokens, RandomWindows, StreamWindows, Windows
from engine.data.tokenizer.vocabulary import FIM, Vocabulary
from engine.errors import DataError

FIRST_RANDOM_TOKEN = 4
"""Random text of a bert model: 0 is padding, 1 to 3 are [CLS], [SEP], [MASK], and text starts here."""


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the samples of all splits of all sources. `notes` collects lines for the user.

    Raises DataError: 417 data.seq_len is too short for the model, 460 the tokenizer has no marks for
    fill-in-the-middle, 464 it has no [CLS], [SEP] and [MASK].
    """

    cfg: DataConfig
    model: ModelConfig
    vocabulary: Vocabulary
    cut: Cut = field(init=False)
    notes: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cut", _cut(self.cfg, self.model))
        if self.model.family is Family.bert:
            self._special()
        elif self.cfg.fim_rate > 0:
            self._marks()

    def samples(self, stream: Stream, split: int, *, own: bool, labels: Path) -> Samples:
        """Samples of a stream. `split`: its number. `own`: our builder wrote the tokens. `labels`: of `kind=rows`.

        Raises DataError: 411 or 418 the text is too short, 419 no other sample can give a next sentence, 461 or 462
        labels are no classes of the sentence head, 463 no completion has a token.
        """
        cfg, end, bert = self.cfg, self.vocabulary.end, self.model.family is Family.bert
        if cfg.kind is SampleKind.completion:
            return self._completions(stream)
        if cfg.kind is SampleKind.rows:
            return Classified(
                stream,
                np.load(labels),
                self._special(),
                cfg.seq_len,
                variable_length=cfg.variable_length,
                label_field=cfg.label_field,
            )
        windows: Windows
        if cfg.variable_length:
            without_end: NDArray[np.int64] | int = 0
            if bert:
                without_end = 1 if own else stream.ended(end)
            windows = DocumentWindows(stream, self.cut, without_end=without_end)
        else:
            windows = StreamWindows(stream, self.cut, borders=not bert and (cfg.document_mask or cfg.fim_rate > 0))
        if self.model.sentence_head is SentenceHead.next_sentence and windows.num_windows < 2:
            raise _no_other_sample(cfg, self.model, stream)
        return self._of_windows(windows, split)

    def random(self, split: int) -> Samples:
        """Samples of random tokens. Raises DataError 420: too few tokens."""
        cfg, bert = self.cfg, self.model.family is Family.bert
        first = FIRST_RANDOM_TOKEN if bert else 0
        if cfg.vocab_size <= first:
            rule = "random text of a bert model takes ids from 4 on: 0 is padding, then [CLS], [SEP] and [MASK]"
            way_out = f"Nearest legal: data.vocab_size={first + 1}"
            raise DataError.of(420, "data.vocab_size", cfg.vocab_size, rule, way_out)
        tokens = RandomTokens(first=first, vocab_size=cfg.vocab_size, documents=cfg.document_mask)
        windows = RandomWindows(cfg.seed, split, self.cut, tokens, variable_length=cfg.variable_length)
        return self._of_windows(windows, split)

    def _of_windows(self, windows: Windows, split: int) -> Samples:
        cfg, vocabulary = self.cfg, self.vocabulary
        if self.model.family is Family.bert:
            special = self._special()
            masking = Masking(vocabulary, special, cfg.mask_rate, whole_words=cfg.whole_words)
            seed = seed_of(cfg.seed, "masks", split)
            return MaskedSamples(windows, special, masking, self.model, seed=seed, seq_len=cfg.seq_len)
        infill = None
        if cfg.fim_rate > 0:
            infill = Infill(cfg.fim_rate, self._marks(), vocabulary.end, seed_of(cfg.seed, "infill", split))
        return NextTokenSamples(windows, vocabulary.end, cfg.seq_len, masked=cfg.document_mask, infill=infill)

    def _completions(self, stream: Stream) -> Samples:
        cfg = self.cfg
        found = Completions(
            stream,
            self.vocabulary.end,
            cfg.seq_len,
            masked=cfg.document_mask,
            variable_length=cfg.variable_length,
        )
        if found.cut_prompts or found.cut_completions:
            self.notes.append(
                f"data: of {stream.num_documents} records of {stream.path} data.seq_len={cfg.seq_len} cuts the "
                f"beginning of {found.cut_prompts} prompts and the end of {found.cut_completions} completions"
            )
        return found

    def _marks(self) -> tuple[int, int, int]:
        if self.vocabulary.fim is None:
            names = " nor ".join(" ".join(marks) for marks in FIM)
            rule = f"the tokenizer has no marks of prefix, middle and suffix; looked for were neither {names}"
            way_out = "Use data.fim_rate=0, data.tokenizer=bpe, or a tokenizer with these tokens"
            raise DataError.of(460, "data.fim_rate", self.cfg.fim_rate, rule, way_out)
        return self.vocabulary.fim

    def _special(self) -> Special:
        found = self.vocabulary
        if found.cls is None or found.sep is None or found.mask is None:
            names = {"[CLS]": found.cls, "[SEP]": found.sep, "[MASK]": found.mask}
            lacking = " and ".join(name for name, token in names.items() if token is None)
            rule = f"a bert model needs [CLS], [SEP] and [MASK], and the tokenizer has no {lacking}"
            way_out = "Use data.tokenizer=wordpiece or bpe, or a tokenizer of a bert model"
            raise DataError.of(464, "data.tokenizer", self.cfg.tokenizer, rule, way_out)
        return Special(found.end, found.cls, found.sep, found.mask)


def _cut(cfg: DataConfig, model: ModelConfig) -> Cut:
    if model.family is Family.gpt:
        stride = cfg.seq_len - cfg.overlap
        return Cut(seq_len=cfg.seq_len, width=cfg.seq_len + 1, stride=stride, shortest=2, context=cfg.overlap)
    pairs = makes_pairs(model)
    width, shortest = cfg.seq_len - 2 - pairs, 1 + pairs
    if width < shortest:
        legal = cfg.seq_len - width + shortest
        form = "[CLS] A [SEP] B [SEP]" if pairs else "[CLS] A [SEP]"
        rule = f"a sample of this bert model is {form}, at least {legal} tokens"
        raise DataError.of(417, "data.seq_len", cfg.seq_len, rule, f"Nearest legal: data.seq_len={legal}")
    return Cut(seq_len=cfg.seq_len, width=width, stride=width, shortest=shortest)


def _no_other_sample(cfg: DataConfig, model: ModelConfig, stream: Stream) -> Exception:
    shorter = "a smaller data.seq_len" if cfg.variable_length else f"data.seq_len={stream.num_tokens // 2 + 3}"
    way_out = f"Nearest legal: {shorter}, or model.sentence_head=sentence_order"
    rule = f"a wrong next sentence comes from another sample, and {stream.path} has one of data.seq_len {cfg.seq_len}"
    return DataError.of(419, "model.sentence_head", model.sentence_head, rule, way_out)
