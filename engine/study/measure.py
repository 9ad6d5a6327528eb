"""What a parity case measures, on the oracle and on the ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.gather import gather_to_main
from engine.config.derived import sequence_multiple
from engine.config.enums import DType, Kernel, OptimizerName
from engine.config.schema import Config, OptimConfig
from engine.data import open_data
from engine.dist.context import ParallelContext
from engine.model.batch import Batch
from engine.model.build import build_layers
from engine.model.layers import random_weights
from engine.plan.stages import stage_bounds
from engine.protocols import Engine
from engine.runtime.reference import ReferenceEngine
from engine.study.cases import GLOBAL_BATCH
from engine.train.kernels import choose_kernels

_RULES: dict[str, dict[str, Any]] = {
    "sgd": {"name": OptimizerName.sgd, "lr": 0.2, "momentum": 0.9, "weight_decay": 0.0},
    "adamw": {"name": OptimizerName.adamw, "lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1},
}
"""Optimizers of the two runs, with the rate of the first step; it falls linearly towards 0. The rates lie between two
kinds of rounding: lower, a norm weight near 1 moves so little that the rounding of its storage shows (6e-5 of the way,
also of the oracle when it groups its batches otherwise); higher or constant, the steps amplify rounding (in clip norms
1e-6 of Llama's, with AdamW at 2e-3 also of Qwen2's, whatever the layout). AdamW's eps is large: with a small one,
gradients that are zero but for rounding move weights as far as real ones do."""


@dataclass(slots=True)
class Run:
    """Losses and clip norms of `train.steps` steps, and the parameters after them."""

    losses: list[float]
    norms: list[float]
    after: dict[str, Tensor]


@dataclass(slots=True)
class Measured:
    """Parameters at the start, raw gradients of the first step, and what two optimizers make of the same start."""

    before: dict[str, Tensor]
    gradients: dict[str, Tensor]
    runs: dict[str, Run]
    """By name: sgd, adamw; in low precision sgd only."""


def measure(
    cfg: Config, build: Callable[[Config], Engine], batches: Callable[[ParallelContext, int], Iterator[Batch]]
) -> Measured:
    """Run each optimizer from the start; the result is on rank 0, empty dictionaries elsewhere. Collective.

    Args:
        batches: the micro-batches of a rank in a step.
    """
    out = Measured({}, {}, {})
    for name in _RULES if cfg.precision.dtype is DType.fp32 else ("sgd",):
        optim: OptimConfig = replace(cfg.optim, **_RULES[name])
        kernels = cfg.kernels if name == "adamw" else replace(cfg.kernels, optimizer=Kernel.auto)
        engine = build(replace(cfg, optim=optim, kernels=kernels))
        if not out.runs:
            out.before = gather_to_main(engine.parameters(), engine.ctx)
            engine.on_gradients = partial(_keep_gradients, engine, out.gradients)
        losses, norms = [], []
        for step in range(cfg.train.steps):
            lr = optim.lr * (1 - step / cfg.train.steps)
            result = engine.train_step(batches(engine.ctx, step), lr)
            engine.on_gradients = None
            losses.append(float(result.loss))
            norms.append(float(result.grad_norm))
        out.runs[name] = Run(losses, norms, gather_to_main(engine.parameters(), engine.ctx))
        del engine
        gc.collect()
    return out


def _keep_gradients(engine: Engine, found: dict[str, Tensor]) -> None:
    found.update(gather_to_main(engine.gradients(), engine.ctx))


def measure_oracle(cfg: Config, device: torch.device) -> Measured:
    """The measurement of plain PyTorch in one process: the same global batches, sixteen samples at a time."""
    ctx = ParallelContext.single(device)

    def build(cfg: Config) -> Engine:
        layers = build_layers(cfg, ctx, choose_kernels(cfg, device).kernels)
        return ReferenceEngine(layers, random_weights(cfg.train.seed), cfg, ctx)

    return measure(cfg, build, _reader(cfg, GLOBAL_BATCH // 2, 2))


def measure_ranks(cfg: Config, ctx: ParallelContext) -> Measured:
    """The parallel engine's measurement on this rank's part of the grid. Collective."""
    from engine import runtime

    def build(cfg: Config) -> Engine:
        kernels = choose_kernels(cfg, ctx.device).kernels
        layers, initial = build_layers(cfg, ctx, kernels), random_weights(cfg.train.seed)
        return runtime.build(layers, stage_bounds(cfg), initial, cfg, ctx, kernels.adamw_step)

    return measure(cfg, build, _reader(cfg, cfg.train.micro_batch, cfg.train.accum_steps))


def _reader(cfg: Config, micro_batch: int, accum: int) -> Callable[[ParallelContext, int], Iterator[Batch]]:
    split, multiple = open_data(cfg.data, cfg.model).train, sequence_multiple(cfg.parallel)

    def read(ctx: ParallelContext, step: int) -> Iterator[Batch]:
        return split.micro_batches(
            step * micro_batch * accum * ctx.dp.size,
            dp_rank=ctx.dp.rank,
            dp=ctx.dp.size,
            micro_batch=micro_batch,
            accum_steps=accum,
            multiple=multiple,
        )

    return read
