"""What all runners do around a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from engine.config.enums import Recompute
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.batch import Batch
from engine.model.feed import Feed, count_targets, make_feed
from engine.model.gpt import uses_sequence
from engine.model.host_checkpoints import HostCheckpoints


def make_feeds(batches: Iterable[Batch], cfg: Config, ctx: ParallelContext) -> list[Feed]:
    """This rank's parts of the micro-batches of a step, with the counts of the global batch. Collective."""
    batches = list(batches)
    counts = count_targets(batches, ctx)
    sequence = uses_sequence(cfg, ctx)
    return [make_feed(batch, counts, ctx, sequence=sequence, seed=cfg.train.seed) for batch in batches]


def sum_of_shares(share: Tensor, ctx: ParallelContext) -> Tensor:
    """The loss from each rank's sum of shares: 0 on stages that do not compute it. Collective."""
    for axis in (ctx.pp, ctx.reduce):
        if axis.group is not None:
            dist.all_reduce(share, group=axis.group)
    return share


def recomputation(cfg: Config) -> dict[str, Any]:
    """What `build_stacks` must know of it."""
    train = cfg.train
    return {
        "recompute": train.recompute_interval if train.recompute is Recompute.full else 0,
        "nested": train.recompute_nested,
        "host": HostCheckpoints() if train.recompute_offload else None,
    }
