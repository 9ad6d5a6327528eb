"""Validation weighs each sample alike, also those of a last batch that is smaller than the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch

from engine.data import Data, Split
from engine.dist.context import ParallelContext
from engine.model.batch import IGNORE, Batch
from engine.observe.sinks import Fanout
from engine.protocols import Engine
from engine.train.hooks import Validation
from tests.helpers.configs import make


class TenSamples:
    """Sample i is worth the loss i."""

    num_samples = 10

    def num_batches(self, size: int) -> int:
        return -(-self.num_samples // size)

    def micro_batches(self, first_sample: int, *, micro_batch: int, **_: Any) -> Iterator[Batch]:
        numbers = torch.arange(first_sample, first_sample + micro_batch)
        labels = numbers[:, None].masked_fill(numbers[:, None] >= self.num_samples, IGNORE)
        yield Batch(tokens_BS=labels, labels_BS=labels, samples_B=numbers)


class Losses:
    """An engine whose loss is the mean of the labels."""

    ctx = ParallelContext.single()

    def eval_step(self, batches: Iterable[Batch]) -> torch.Tensor:
        labels = torch.cat([batch.labels_BS for batch in batches])
        return labels[labels != IGNORE].float().mean()


def test_the_smaller_last_batch_counts_by_its_samples() -> None:
    base = make()
    cfg = replace(base, train=replace(base.train, micro_batch=4, accum_steps=1, eval_batches=8))
    data = cast(Data, SimpleNamespace(valid=cast(Split, TenSamples())))
    hook = Validation(cast(Engine, Losses()), data, cfg, Fanout([]), None, 0)
    hook.before_training()
    summary: dict[str, Any] = {}
    hook.after_training(summary)
    assert summary["first_val_loss"] == sum(range(10)) / 10
