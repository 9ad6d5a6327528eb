"""Faults that 3D engines have really had, planted on a rank so that the parity study must find them.

Each function is called on every rank before an engine is built, in a process that ends with the case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.dist.context import AxisGroup, ParallelContext
from engine.model import norm
from engine.model.batch import IGNORE, Batch
from engine.model.feed import Feed
from engine.parallel import cross_entropy
from engine.parallel.linear import RowParallelLinear
from engine.parallel.sequence import leave


def divide_by_accumulation_twice() -> None:
    """Every pipeline stage, not only the last, divides the gradient by the accumulation steps (DeepSpeed#8152)."""
    from engine.runtime.ds_engine import Engine

    right = Engine.backward_from

    def broken(self: Engine, output: Tensor, gradient: Tensor | None) -> None:
        right(self, output, None if gradient is None else gradient / self.gradient_accumulation_steps())

    Engine.backward_from = broken  # type: ignore[method-assign]


def forget_row_bias_reduction() -> None:
    """The bias of a row-parallel layer is shared out before the sum, so each rank sees only its share's gradient."""

    def forward(self: RowParallelLinear, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return leave(
            y if self.bias is None else y + self.bias / self.tp.size,
            self.tp,
            sequence=self.sequence,
            ordered=self.ordered,
        )

    RowParallelLinear.forward = forward  # type: ignore[method-assign]


def forget_tied_reduction() -> None:
    """The stages that hold a tied weight keep their own part of its gradient."""
    from engine.runtime.tied import TiedCopy

    def hand_in(self: TiedCopy, backward: Callable[[Tensor, Tensor], None]) -> None:
        assert self._total is not None
        backward(self._weight.view_as(self._weight), self._total.to(self._weight.dtype))
        self._total = None

    TiedCopy.hand_in = hand_in  # type: ignore[method-assign]


def sum_over_replicas() -> None:
    """Gradients are summed over the replicas instead of averaged."""

    def change(runner: Any) -> None:
        runner._ds.gradient_average = False
        runner._ds.optimizer.gradient_average = False

    _after_building(change)


def leave_out_a_context_rank() -> None:
    """Gradients of one of the ranks that share a sequence never reach the sum."""

    def change(runner: Any) -> None:
        if runner.ctx.cp.rank > 0:
            for parameter in runner._ds.module.parameters():
                parameter.register_hook(torch.zeros_like)

    _after_building(change)


def _after_building(change: Callable[[Any], None]) -> None:
    from engine.runtime.pipeline import PipelineRunner
    from engine.runtime.zero import ZeroRunner

    for runner in (PipelineRunner, ZeroRunner):
        build = runner.__init__

        def broken(self: Any, *args: Any, build: Any = build, **kwargs: Any) -> None:
            build(self, *args, **kwargs)
            change(self)

        runner.__init__ = broken  # type: ignore[method-assign]


def let_padding_into_softmax() -> None:
    """Padded vocabulary takes part in the softmax."""

    def mask_nothing(logits_BSV: Tensor, vocab_size: int, tp: AxisGroup) -> Tensor:
        return logits_BSV

    cross_entropy.mask_padding = mask_nothing


def forget_norm_reduction() -> None:
    """With sequence parallelism a norm's weight keeps the gradient of one rank's positions."""

    def part(parameter: Tensor, tp: AxisGroup, *, sequence: bool) -> Tensor:
        return parameter

    norm.whole = part


def normalise_on_each_rank() -> None:
    """The loss is the mean of the replicas' means: targets of a replica that has few of them weigh more."""
    from engine.runtime import steps

    def count(batches: Iterable[Batch], ctx: ParallelContext) -> tuple[Tensor, Tensor]:
        targets = sum(int((batch.labels_BS != IGNORE).sum()) for batch in batches)
        return torch.tensor(float(targets * ctx.dp.size)), torch.tensor(1.0)

    steps.count_targets = count


def recompute_with_other_masks() -> None:
    """What is computed again in the backward pass drops other elements than the forward pass did."""
    right = Feed.keys_BL

    def keys_BL(self: Feed, site: int) -> Tensor:
        in_backward = torch._C._current_graph_task_id() >= 0
        return right(replace(self, seed=self.seed + in_backward), site)

    Feed.keys_BL = keys_BL  # type: ignore[method-assign]


def swap_chunks() -> None:
    """A stage with two chunks of plain blocks runs the later one first."""
    from engine.runtime.executor import Executor, StageModel

    right = Executor.__init__

    def broken(self: Executor, program: Any, model: StageModel, *rest: Any) -> None:
        stacks: list[Any] = list(model.chunks.values())
        if all(layer.repeats for stack in stacks for layer in stack.layers):
            model = replace(model, chunks=dict(zip(model.chunks, reversed(stacks), strict=True)))
        right(self, program, model, *rest)

    Executor.__init__ = broken  # type: ignore[method-assign, assignment]
