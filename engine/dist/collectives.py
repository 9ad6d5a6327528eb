"""Collectives with gradients for tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3: the operators f and g).

Each is the identity on an axis of one rank, so the same layer code runs without a process group.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import AxisGroup


class _CopyToAxis(torch.autograd.Function):
    """f: identity forward, sum of the gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOverAxis(torch.autograd.Function):
    """g: sum of the partial results forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def copy_to_axis(x: Tensor, axis: AxisGroup) -> Tensor:
    """Enter a sharded region: `x` (any shape, equal on all ranks) unchanged; its gradient is summed over the axis."""
    return x if axis.group is None else cast(Tensor, _CopyToAxis.apply(x, axis.group))  # type: ignore[no-untyped-call]


def sum_over_axis(x: Tensor, axis: AxisGroup) -> Tensor:
    """Leave a sharded region: the sum of the ranks' partial `x` (any shape); the gradient passes through."""
    return x if axis.group is None else cast(Tensor, _SumOverAxis.apply(x, axis.group))  # type: ignore[no-untyped-call]
