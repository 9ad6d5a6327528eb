"""What the loops of all peers share: the same batches, learning rates, clock and record as `engine.train`.

python -m benchmarks.step.SYSTEM OUT.json [--variant NAME] [--profile FOLDER] [overrides]

A step's time runs from when the loss of the step before was read to when its own is read, which waits for all of the
step's work on the device: `engine.train` with `logging.every=1` waits in the same place. Batches are read ahead by a
thread, as there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.config import launch_env
from engine.config.load import load
from engine.config.schema import Config
from engine.data import open_data
from engine.dist import init
from engine.dist.context import ParallelContext
from engine.model.batch import Batch
from engine.optim.schedule import learning_rate
from engine.topology.grid import Grid
from engine.train import local
from engine.train.hooks import Profile
from engine.train.loop import global_batch
from engine.train.loop import load as read_ahead

Step = Callable[[list[Batch], float], Tensor]
"""This rank's micro-batches and the learning rate of a step -> the loss of the global batch, on the device."""


def main(argv: Sequence[str], make: Callable[[Config, ParallelContext, str], Step]) -> None:
    """Build a system, time its steps and write seconds, losses and peak memory of rank 0 as JSON.

    Args:
        make: from the configuration, this rank's place and the variant to the step.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", default="")
    parser.add_argument("--profile", type=Path, help="folder of the trace")
    options, words = parser.parse_known_args(argv)
    cfg = load(words)
    ctx = _join(cfg)
    step = make(cfg, ctx, options.variant)
    profile = Profile(cfg, options.profile) if options.profile is not None and ctx.is_main else None
    record = _run(step, cfg, ctx, profile)
    if ctx.is_main:
        options.out.write_text(json.dumps(record))
    init.shutdown()


def _join(cfg: Config) -> ParallelContext:
    """This process's place, as torchrun says; a process that nobody started so is alone, in a group of its own."""
    env = launch_env.read(os.environ) or local.alone()
    device = init.local_device(init.resolve_device_type(cfg.train.device), env.local_rank)
    init.export(env)
    init.set_numerics(device, cfg.train.cpu_threads, env.local_world_size, tf32=cfg.precision.tf32)
    init.init_process_group(env, device, cfg.train.timeout_s)
    return ParallelContext.create(Grid.from_config(cfg.parallel, env.world_size), device)


def _run(step: Step, cfg: Config, ctx: ParallelContext, profile: Profile | None) -> dict[str, Any]:
    size = global_batch(cfg, ctx)
    seconds: list[float] = []
    losses: list[float] = []
    with read_ahead(open_data(cfg.data, cfg.model).train, range(0, cfg.train.steps * size, size), cfg, ctx) as loader:
        since = time.perf_counter()
        for number, batches in enumerate(loader):
            losses.append(float(step(batches, learning_rate(cfg.optim, number, cfg.train.steps))))
            seconds.append(time.perf_counter() - since)
            if profile is not None:
                profile.after_finished_step(number + 1)
            since = time.perf_counter()
    peak = torch.cuda.max_memory_allocated(ctx.device) / 2**30 if ctx.device.type == "cuda" else None
    return {"step_s": seconds, "losses": losses, "peak_memory_gib": peak}


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Step with `lr`, each parameter group with its own scale where Octant has given it one (muP)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class TorchLoop:
    """A step of plain PyTorch. Several replicas through DistributedDataParallel, whose buckets hold the gradients and
    are reduced once a step, during the last backward pass.

    Args:
        module: takes what `feeds` makes of a micro-batch to its share of the global batch's mean loss: the shares of
            all micro-batches and replicas add up to it.
        feeds: this rank's micro-batches -> the inputs of `module`.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        feeds: Callable[[list[Batch]], Sequence[Any]],
        cfg: Config,
        ctx: ParallelContext,
    ) -> None:
        self._parameters = list(module.parameters())
        self._optimizer, self._feeds, self._ctx = optimizer, feeds, ctx
        self._clip = cfg.optim.clip_norm or math.inf
        self._ddp: DistributedDataParallel | None = None
        if ctx.dp.size > 1:
            ids = [ctx.device] if ctx.device.type == "cuda" else None
            self._ddp = DistributedDataParallel(module, ids, gradient_as_bucket_view=True)
        self._module: nn.Module = self._ddp or module

    def __call__(self, batches: list[Batch], lr: float) -> Tensor:
        """See `Step`."""
        set_rate(self._optimizer, lr)
        total = torch.zeros((), device=self._ctx.device)
        feeds = self._feeds(batches)
        for index, feed in enumerate(feeds):
            waits = self._ddp is not None and index + 1 < len(feeds)
            with self._ddp.no_sync() if waits and self._ddp is not None else nullcontext():
                share = self._module(feed)
                # DistributedDataParallel averages, and the shares of the replicas are to be added.
                (share * self._ctx.dp.size).backward()
            total += share.detach()
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._ddp is not None:
            dist.all_reduce(total)
        return total
