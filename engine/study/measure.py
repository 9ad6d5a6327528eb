"""What a parity case measures, on the oracle and on the ranks, and how far the two are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.gather import gather_to_main
from engine.config.schema import Config
from engine.data import Split, open_data
from engine.dist.context import ParallelContext
from engine.model.gpt import build_layers
from engine.model.layers import random_weights
from engine.plan.costs import layer_costs
from engine.protocols import Batch, Engine
from engine.runtime.reference import ReferenceEngine
from engine.study.cases import GLOBAL_BATCH, SGD_LR
from engine.topology.partition import partition

STEPS = 5


@dataclass(slots=True)
class Measured:
    """Gradients of the first step, losses and clip norms of `STEPS` SGD steps, parameters before and after them."""

    gradients: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@dataclass(slots=True)
class Comparison:
    """Relative errors of a case; the worst parameter is named."""

    gradient: float = 0.0
    gradient_at: str = ""
    loss: float = 0.0
    norm: float = 0.0
    parameters: float = 0.0
    parameters_at: str = ""
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(engine: Engine, batches: Callable[[int], Iterator[Batch]]) -> Measured:
    """Run `STEPS` steps; the result is on rank 0, empty dictionaries elsewhere. Collective."""
    gradients: dict[str, Tensor] = {}
    ctx = engine.ctx
    before = gather_to_main(engine.parameters(), ctx)
    engine.on_gradients = lambda: gradients.update(gather_to_main(engine.gradients(), ctx))
    losses, norms = [], []
    for step in range(STEPS):
        result = engine.train_step(batches(step), SGD_LR)
        engine.on_gradients = None
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
    return Measured(gradients, losses, norms, before, gather_to_main(engine.parameters(), ctx))


def measure_reference(cfg: Config, device: torch.device) -> Measured:
    """The oracle's measurement of a model: the same global batches, four samples at a time."""
    from engine.train.session import choose_attention

    ctx = ParallelContext.single(device)
    layers = build_layers(cfg.model, ctx, choose_attention(cfg, device).impl.fn)
    engine = ReferenceEngine(layers, random_weights(cfg.train.seed), cfg, ctx)
    split = open_data(cfg.data).train
    return measure(engine, lambda step: _batches(split, step, 0, 1, 4, GLOBAL_BATCH // 4))


def measure_ranks(cfg: Config, ctx: ParallelContext) -> Measured:
    """The parallel engine's measurement on this rank's part of the grid. Collective."""
    from engine import runtime
    from engine.train.session import choose_attention

    layers = build_layers(cfg.model, ctx, choose_attention(cfg, ctx.device).impl.fn)
    bounds = partition(layer_costs(cfg.model, cfg.parallel.balance, cfg.data.seq_len), ctx.pp.size)
    engine = runtime.build(layers, bounds, random_weights(cfg.train.seed), cfg, ctx)
    split, train = open_data(cfg.data).train, cfg.train
    return measure(
        engine, lambda step: _batches(split, step, ctx.dp.rank, ctx.dp.size, train.micro_batch, train.accum_steps)
    )


def _batches(split: Split, step: int, rank: int, dp: int, micro: int, accum: int) -> Iterator[Batch]:
    yield from split.micro_batches(step, dp_rank=rank, dp=dp, micro_batch=micro, accum_steps=accum)


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-30)


def _size(error: float) -> float:
    """An error as it is compared: NaN, which `>` and `max` pass over, is as bad as infinity."""
    return math.inf if math.isnan(error) else error


def compare(got: Measured, want: Measured) -> Comparison:
    """Errors of `got` against the oracle.

    gradient: norm of the difference over the larger of the reference gradient's norm and 1e-3 of the global norm, since
    some gradients, such as a key bias, are zero in theory. parameters: norm of the difference over the distance moved,
    with the same floor. loss and norm: worst of all steps.
    """
    out = Comparison()
    for name in sorted(want.gradients.keys() ^ got.gradients.keys()):
        out.problems.append(f"{name} is in one of the two only")
    if out.problems:
        return out
    global_norm = _global_norm(want.gradients)
    moved = {name: want.after[name] - want.before[name] for name in want.after}
    global_moved = _global_norm(moved)
    for name, reference in want.gradients.items():
        scale = max(float(reference.double().norm()), 1e-3 * global_norm)
        error = _distance(got.gradients[name], reference) / scale
        if _size(error) > _size(out.gradient):
            out.gradient, out.gradient_at = error, name
        scale = max(float(moved[name].double().norm()), 1e-3 * global_moved)
        error = _distance(got.after[name], want.after[name]) / scale
        if _size(error) > _size(out.parameters):
            out.parameters, out.parameters_at = error, name
        if not torch.equal(got.before[name], want.before[name]):
            out.problems.append(f"{name} starts from another value")
    out.loss = max((_relative(a, b) for a, b in zip(got.losses, want.losses, strict=True)), key=_size)
    out.norm = max((_relative(a, b) for a, b in zip(got.norms, want.norms, strict=True)), key=_size)
    return out


def _global_norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors.values()]).norm())


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())
