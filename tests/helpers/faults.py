"""Faults that 3D engines have really had, planted on a rank so that the parity study must find them.

Each function is called on every rank before an engine is built, in a process that ends with the case.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from engine.dist.collectives import sum_over_axis
from engine.dist.context import AxisGroup
from engine.parallel import cross_entropy
from engine.parallel.linear import RowParallelLinear


def divide_by_accumulation_twice() -> None:
    """Every pipeline stage, not only the last, divides the gradient by the accumulation steps (DeepSpeed#8152)."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from engine.runtime.pipeline import _Engine

    _Engine._backward_prologue_per_tensor = DeepSpeedEngine._backward_prologue_per_tensor


def forget_row_bias_reduction() -> None:
    """The bias of a row-parallel layer is shared out before the sum, so each rank sees only its share's gradient."""

    def forward(self: RowParallelLinear, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return sum_over_axis(y if self.bias is None else y + self.bias / self.tp.size, self.tp)

    RowParallelLinear.forward = forward  # type: ignore[method-assign]


def forget_tied_reduction() -> None:
    """The stages that hold a tied weight keep their own part of its gradient."""
    from deepspeed.runtime.pipe import schedule

    from engine.runtime.pipeline import _Engine

    _Engine._INSTRUCTION_MAP = {**_Engine._INSTRUCTION_MAP, schedule.ReduceTiedGrads: lambda engine: None}


def sum_over_replicas() -> None:
    """Gradients are summed over the replicas instead of averaged."""
    from engine.runtime.pipeline import PipelineRunner
    from engine.runtime.zero import ZeroRunner

    for runner in (PipelineRunner, ZeroRunner):
        build = runner.__init__

        def broken(self: Any, *args: Any, build: Any = build, **kwargs: Any) -> None:
            build(self, *args, **kwargs)
            self._ds.gradient_average = False
            self._ds.optimizer.gradient_average = False

        runner.__init__ = broken  # type: ignore[method-assign]


def let_padding_into_softmax() -> None:
    """Padded vocabulary takes part in the softmax."""

    def mask_nothing(logits_BSV: Tensor, vocab_size: int, tp: AxisGroup) -> Tensor:
        return logits_BSV

    cross_entropy.mask_padding = mask_nothing
