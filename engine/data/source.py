"""Open what was prepared: from data and model options to splits of the right kind of samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.config.enums import Family, SentenceHead
from engine.config.schema import DataConfig, ModelConfig
from engine.data.batches import Split
from engine.data.build import RANDOM_SOURCE
from engine.data.cache import TOKENIZER, TRAIN, VALID, cache_root, entry_folder, read_meta
from engine.data.dataset import NextTokenSamples, Samples
from engine.data.masked import FIRST_RANDOM_TOKEN, MaskedSamples, MaskedVocabulary, makes_pairs
from engine.data.sampler import shuffled
from engine.data.tokenizer import load_tokenizer
from engine.data.tokens import TokenFile
from engine.data.windows import Cut, DocumentWindows, FileWindows, RandomWindows, Windows
from engine.errors import DataError

_TRAIN, _VALID = 0, 1
"""Streams of random numbers of the two splits."""


@dataclass(frozen=True, slots=True)
class Data:
    """An opened corpus. `vocab_size` is the tokenizer's actual size, at most data.vocab_size.

    `valid` is None when data.valid_fraction is 0. `fingerprint` identifies tokenizer and tokens by content: it is equal
    on two machines when they train on the same data. `folder` is the cache entry (for `random` the cache root).
    """

    train: Split
    valid: Split | None
    vocab_size: int
    fingerprint: str
    folder: Path


def open_data(cfg: DataConfig, model: ModelConfig) -> Data:
    """Memory-map what `prepare` built for `cfg`, and make the samples that `model` learns from.

    A `gpt` predicts each next token; a `bert` gets masked tokens, and pairs of segments when it has a sentence head or
    segment embeddings. Training is shuffled by data.seed and has no end; validation reads once, in file order.

    Raises DataError: 406 the tokenizer is damaged, 407 to 409 a token file is missing, foreign or truncated, 411 it is
    shorter than one sample, 412 nothing was prepared, 413 the entry is damaged, 417 data.seq_len is too short for
    `model`, 418 no document is long enough, 419 no other sample can give a next sentence, 420 too few random tokens.
    """
    cut = _cut(cfg, model)
    if cfg.source == RANDOM_SOURCE:
        return _random_data(cfg, model, cut)
    folder = entry_folder(cfg)
    meta = read_meta(folder)
    vocabulary = None
    if model.family is Family.bert:
        vocabulary = MaskedVocabulary.of_tokenizer(load_tokenizer(folder / TOKENIZER))

    def split(name: str, stream: int) -> Samples:
        file = TokenFile.open(folder / name)
        windows: Windows
        if cfg.variable_length:
            windows = DocumentWindows(file, cut, with_end=vocabulary is None)
        else:
            windows = FileWindows(file, cut)
        if model.sentence_head is SentenceHead.next_sentence and windows.num_windows < 2:
            raise _no_other_sample(cfg, model, file)
        return _samples(cfg, model, windows, vocabulary, stream)

    # Validation first: its file is the smaller one, so a length that a refusal names fits both.
    valid = split(VALID, _VALID) if meta["valid"] is not None else None
    train = split(TRAIN, _TRAIN)
    return Data(
        Split(train, partial(shuffled, cfg.seed, train.num_samples), finite=False),
        None if valid is None else Split(valid, partial(_wrapped, valid.num_samples), finite=True),
        meta["vocab_size"],
        meta["fingerprint"],
        folder,
    )


def _wrapped(num_samples: int, number: int) -> int:
    return number % num_samples


def _cut(cfg: DataConfig, model: ModelConfig) -> Cut:
    if model.family is Family.gpt:
        return Cut(seq_len=cfg.seq_len, specials=0, overlap=1, shortest=2)
    pairs = makes_pairs(model)
    cut = Cut(seq_len=cfg.seq_len, specials=2 + pairs, overlap=0, shortest=1 + pairs)
    if cut.width < cut.shortest:
        legal = cut.specials + cut.shortest
        form = "[CLS] A [SEP] B [SEP]" if pairs else "[CLS] A [SEP]"
        rule = f"a sample of this bert model is {form}, at least {legal} tokens"
        raise DataError.of(417, "data.seq_len", cfg.seq_len, rule, f"Nearest legal: data.seq_len={legal}")
    return cut


def _samples(
    cfg: DataConfig, model: ModelConfig, windows: Windows, vocabulary: MaskedVocabulary | None, stream: int
) -> Samples:
    if vocabulary is None:
        return NextTokenSamples(windows)
    return MaskedSamples(windows, vocabulary, model, cfg.mask_rate, (cfg.seed, stream))


def _no_other_sample(cfg: DataConfig, model: ModelConfig, file: TokenFile) -> Exception:
    shorter = "a smaller data.seq_len" if cfg.variable_length else f"data.seq_len={file.count // 2 + 3}"
    way_out = f"Nearest legal: {shorter}, or model.sentence_head=sentence_order"
    rule = f"a wrong next sentence comes from another sample, and {file.path} has one of data.seq_len {cfg.seq_len}"
    return DataError.of(419, "model.sentence_head", model.sentence_head, rule, way_out)


def _random_data(cfg: DataConfig, model: ModelConfig, cut: Cut) -> Data:
    vocabulary, first = None, 0
    if model.family is Family.bert:
        vocabulary, first = MaskedVocabulary.of_random(cfg.vocab_size), FIRST_RANDOM_TOKEN
        if cfg.vocab_size <= first:
            rule = f"random text of a bert model takes ids from {first} on: 0 is padding, then [CLS], [SEP] and [MASK]"
            way_out = f"Nearest legal: data.vocab_size={first + 1}"
            raise DataError.of(420, "data.vocab_size", cfg.vocab_size, rule, way_out)

    def split(stream: int) -> Split:
        windows = RandomWindows(
            cfg.seed, stream, cut, first=first, vocab_size=cfg.vocab_size, variable_length=cfg.variable_length
        )
        samples = _samples(cfg, model, windows, vocabulary, stream)
        return Split(samples, partial(_wrapped, samples.num_samples), finite=stream == _VALID)

    facts = f"{RANDOM_SOURCE} {cfg.vocab_size} {cfg.seed}"
    return Data(
        train=split(_TRAIN),
        valid=split(_VALID) if cfg.valid_fraction > 0 else None,
        vocab_size=cfg.vocab_size,
        fingerprint=hashlib.blake2b(facts.encode(), digest_size=16).hexdigest(),
        folder=cache_root(cfg),
    )
