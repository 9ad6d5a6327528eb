"""Open what was prepared: from data and model options to splits of the right kind of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.config.enums import Family
from engine.config.schema import ModelConfig
from engine.config.schema_data import DataConfig
from engine.data.build.cache import RANDOM_SOURCE, SPLITS, TOKENIZER, cache_root, entries, read_meta
from engine.data.samples.batches import Split
from engine.data.samples.blend import Blended, BlendedOrder, interleaved
from engine.data.samples.dataset import Samples
from engine.data.samples.make import FIRST_RANDOM_TOKEN, Maker
from engine.data.samples.sampler import Shuffle
from engine.data.samples.stream import Positions, Stream
from engine.data.storage.indexed import IndexedFile
from engine.data.tokenizer.vocabulary import Vocabulary, vocabulary_of


@dataclass(frozen=True, slots=True)
class Data:
    """An opened corpus. `valid` and `test` are None when no documents were held out for them.

    `fingerprint` identifies tokenizer and tokens by content: it is equal on two machines when they train on the same
    data. `folder` is the cache entry, of a blend the first source's (for `random` the cache root). `notes`: lines
    about the data that the user should read.
    """

    train: Split
    valid: Split | None
    test: Split | None
    vocabulary: Vocabulary
    fingerprint: str
    folder: Path
    notes: tuple[str, ...] = ()


def open_data(cfg: DataConfig, model: ModelConfig) -> Data:
    """Memory-map what `prepare` built for `cfg`, and make the samples that `model` learns from.

    A `gpt` predicts each next token, or completions; a `bert` gets masked tokens, and pairs of segments when it has a
    sentence head or segment embeddings, or texts with classes. Training is shuffled by data.seed and the fingerprint,
    and has no end; with a blend its order of sources is `engine.data.samples.blend`'s. Validation and test read once,
    in file order, the sources of a blend evenly mixed.

    Raises DataError: 411 a split is shorter than one sample, 412 nothing was prepared, 413 an entry is damaged, 417
    data.seq_len is too short for `model`, 418 no document is long enough, 419 no other sample can give a next
    sentence, 420 too few random tokens, 430 to 437 token files are damaged, 460 and 464 the tokenizer lacks tokens,
    461 and 462 labels, 463 completions.
    """
    if cfg.source == RANDOM_SOURCE and not cfg.blend:
        return _random_data(cfg, model)
    found = entries(cfg)
    folders, weights = [folder for folder, _ in found], [weight for _, weight in found]
    metas = [read_meta(folder) for folder in folders]
    maker = Maker(cfg, model, vocabulary_of(folders[0] / TOKENIZER))
    fingerprints = [meta["fingerprint"] for meta in metas]
    fingerprint = fingerprints[0] if len(found) == 1 else _digest(list(zip(fingerprints, weights, strict=True)))
    parts: dict[str, list[Samples]] = {}
    # Validation first: its file is the smaller one, so a length that a refusal names fits both.
    for name in reversed(SPLITS):
        number = SPLITS.index(name)
        parts[name] = [
            _samples(maker, folder, meta["prefix"], name, number)
            for folder, meta in zip(folders, metas, strict=True)
            if name in meta["splits"]
        ]
    end = maker.vocabulary.end
    return Data(
        train=_training(parts["train"], cfg.seed, fingerprints, weights, end),
        valid=_held_out(parts["valid"], end),
        test=_held_out(parts["test"], end),
        vocabulary=maker.vocabulary,
        fingerprint=fingerprint,
        folder=folders[0],
        notes=tuple(maker.notes),
    )


def _digest(facts: object) -> str:
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _samples(maker: Maker, folder: Path, prefix: str | None, name: str, number: int) -> Samples:
    labels = folder / f"{name}.labels.npy"
    if prefix is None:
        stream = Stream(IndexedFile.open(folder / name, "data.cache_dir"))
        return maker.samples(stream, number, own=True, labels=labels)
    documents = np.load(folder / f"{name}.documents.npy")
    return maker.samples(Stream(IndexedFile.open(Path(prefix)), documents), number, own=False, labels=labels)


def _training(parts: list[Samples], seed: int, fingerprints: list[str], weights: list[float], end: int) -> Split:
    orders = [
        Shuffle(seed, fingerprint, part.num_samples) for fingerprint, part in zip(fingerprints, parts, strict=True)
    ]
    if len(parts) == 1:
        return Split(parts[0], orders[0], finite=False, end=end)
    blended = Blended(parts, end)
    return Split(blended, BlendedOrder(blended, weights, orders), finite=False, end=end)


def _held_out(parts: list[Samples], end: int) -> Split | None:
    if not parts:
        return None
    if len(parts) == 1:
        return Split(parts[0], _repeated(parts[0].num_samples), finite=True, end=end)
    blended = Blended(parts, end)
    order = blended.index(*interleaved([part.num_samples for part in parts]).T)
    return Split(blended, lambda numbers: order[numbers % len(order)], finite=True, end=end)


def _repeated(num_samples: int) -> Callable[[Positions], Positions]:
    return lambda numbers: numbers % num_samples


def _random_data(cfg: DataConfig, model: ModelConfig) -> Data:
    vocabulary = _random_vocabulary(cfg, model)
    maker = Maker(cfg, model, vocabulary)

    def split(number: int) -> Split:
        samples = maker.random(number)
        return Split(samples, _repeated(samples.num_samples), finite=number > 0, end=vocabulary.end)

    return Data(
        train=split(0),
        valid=split(1) if cfg.valid_fraction > 0 else None,
        test=split(2) if cfg.test_fraction > 0 else None,
        vocabulary=vocabulary,
        fingerprint=_digest(f"{RANDOM_SOURCE} {cfg.vocab_size} {cfg.seed}"),
        folder=cache_root(cfg),
    )


def _random_vocabulary(cfg: DataConfig, model: ModelConfig) -> Vocabulary:
    """Every third id of text begins a word."""
    ids, bert = np.arange(cfg.vocab_size), model.family is Family.bert
    text = ids >= (FIRST_RANDOM_TOKEN if bert else 1)
    cls, sep, mask = (1, 2, 3) if bert else (None, None, None)
    return Vocabulary(
        size=cfg.vocab_size,
        end=0,
        cls=cls,
        sep=sep,
        mask=mask,
        fim=None,
        text=text,
        word_start=~text | (ids % 3 == 0),
    )
