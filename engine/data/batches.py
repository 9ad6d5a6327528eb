"""Micro-batches for one data-parallel replica, read from a prepared corpus or drawn at random.

Shape suffixes: B rows of a micro-batch, S tokens of a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.config.schema import DataConfig
from engine.data.build import RANDOM_SOURCE
from engine.data.cache import TRAIN, VALID, cache_root, entry_folder, read_meta
from engine.data.dataset import RandomSamples, Samples, TokenSamples
from engine.data.sampler import sample_numbers, shuffled
from engine.data.tokens import TokenFile


class MicroBatch(NamedTuple):
    """Input of one forward pass: int64 CPU tensors of shape (B, S); labels are the tokens one position later."""

    tokens_BS: Tensor
    labels_BS: Tensor


@dataclass(frozen=True, slots=True)
class Split:
    """Samples in a fixed order. `index_of` maps a global sample number, which has no end, to a sample."""

    samples: Samples
    index_of: Callable[[int], int]

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self.samples.num_samples

    def micro_batches(
        self, batch_index: int, *, dp_rank: int, dp: int, micro_batch: int, accum_steps: int
    ) -> Iterator[MicroBatch]:
        """The `accum_steps` micro-batches of `micro_batch` rows that replica `dp_rank` reads in one global batch.

        A pure function of its arguments: resuming at step n means calling it with batch_index n.
        """
        for micro_index in range(accum_steps):
            numbers = sample_numbers(
                batch_index, micro_index, dp_rank=dp_rank, dp=dp, micro_batch=micro_batch, accum_steps=accum_steps
            )
            rows = torch.from_numpy(np.stack([self.samples.window(self.index_of(number)) for number in numbers]))
            yield MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


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


def open_data(cfg: DataConfig) -> Data:
    """Memory-map what `prepare` built for `cfg`. Training is shuffled by data.seed, validation reads in file order.

    Raises DataError: 407 to 409 a token file is missing, foreign or truncated, 411 it is shorter than one sample,
    412 nothing was prepared, 413 the entry is damaged.
    """
    if cfg.source == RANDOM_SOURCE:
        return _random_data(cfg)
    folder = entry_folder(cfg)
    meta = read_meta(folder)
    train = TokenSamples(TokenFile.open(folder / TRAIN), cfg.seq_len)
    valid = None
    if meta["valid"] is not None:
        held_out = TokenSamples(TokenFile.open(folder / VALID), cfg.seq_len)
        valid = Split(held_out, partial(_wrapped, held_out.num_samples))
    order = partial(shuffled, cfg.seed, train.num_samples)
    return Data(Split(train, order), valid, meta["vocab_size"], meta["fingerprint"], folder)


def _wrapped(num_samples: int, number: int) -> int:
    return number % num_samples


def _random_data(cfg: DataConfig) -> Data:
    train, valid = (RandomSamples(cfg.seed, stream, cfg.vocab_size, cfg.seq_len) for stream in (0, 1))
    facts = f"{RANDOM_SOURCE} {cfg.vocab_size} {cfg.seed}"
    return Data(
        train=Split(train, partial(_wrapped, train.num_samples)),
        valid=Split(valid, partial(_wrapped, valid.num_samples)) if cfg.valid_fraction > 0 else None,
        vocab_size=cfg.vocab_size,
        fingerprint=hashlib.blake2b(facts.encode(), digest_size=16).hexdigest(),
        folder=cache_root(cfg),
    )
