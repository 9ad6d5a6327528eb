"""Linear layers cut over the tensor-parallel axis. Shapes: D in, O out, t ranks on the axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.dist.collectives import all_gather, copy_to_axis, reduce_scatter
from engine.dist.context import AxisGroup
from engine.parallel.logical import LogicalTensor, make_parameter, replicated_parameter
from engine.parallel.sequence import leave, whole


class _GatheredLinear(torch.autograd.Function):
    """All-gather along the sequence and a linear map; only this rank's positions are kept for the backward pass.

    All are gathered again there (arXiv 2205.05198, section 4.2.2): keeping all positions would give back what sequence
    parallelism saves.
    """

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x_BLD, weight)
        ctx.group, ctx.has_bias = group, bias is not None
        return F.linear(all_gather(x_BLD, group, dim=1), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x_BLD, weight = ctx.saved_tensors
        grad_BSO = grads[0]
        x_BSD = all_gather(x_BLD, ctx.group, dim=1)
        grad_weight = grad_BSO.flatten(0, 1).t() @ x_BSD.flatten(0, 1)
        grad_bias = grad_BSO.sum(dim=(0, 1)) if ctx.has_bias else None
        return reduce_scatter(grad_BSO @ weight, ctx.group, dim=1), grad_weight, grad_bias, None


# See `engine.dist.collectives`: torch 2.11 compiles such functions to zero gradients.
@torch.compiler.disable
def _gathered_linear(x_BLD: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    out: Tensor = _GatheredLinear.apply(x_BLD, weight, bias, group)
    return out


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: AxisGroup, *, sequence: bool) -> Tensor:
    """Residual stream (B, S or S/t, D) and this rank's rows of W (O/t, D) -> this rank's outputs (B, S, O/t)."""
    if sequence and tp.group is not None:
        return _gathered_linear(x, weight, bias, tp.group)
    return F.linear(copy_to_axis(x, tp), weight, bias)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the outputs cut: each rank holds O/t rows of W and computes O/t columns of y.

    Args:
        in_features, out_features: logical sizes D and O.
        segments: sizes of fused parts of O (query, key and value, say), each cut on its own. Default: one part.
        init_std: standard deviation of the initial weight.
        sequence: inputs hold this rank's part of the positions (see `engine.parallel.sequence`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp: AxisGroup,
        bias: bool,
        init_std: float,
        segments: tuple[int, ...] = (),
        sequence: bool = False,
    ) -> None:
        super().__init__()
        self.tp, self.sequence = tp, sequence
        weight = LogicalTensor((out_features, in_features), dim=0, segments=segments, init_std=init_std)
        self.weight = make_parameter((out_features // tp.size, in_features), weight)
        self.bias: nn.Parameter | None = None
        if bias:
            logical = LogicalTensor((out_features,), dim=0, segments=segments, decay=False)
            self.bias = make_parameter((out_features // tp.size,), logical)

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream (B, S or S/t, D) -> (B, S, O/t)."""
        return column_linear(x, self.weight, self.bias, self.tp, sequence=self.sequence)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the inputs cut: each rank holds D/t columns of W; partial results are summed over the axis.

    The bias is whole on every rank and added once, after the sum.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp: AxisGroup,
        bias: bool,
        init_std: float,
        sequence: bool = False,
    ) -> None:
        super().__init__()
        self.tp, self.sequence = tp, sequence
        logical = LogicalTensor((out_features, in_features), dim=1, init_std=init_std)
        self.weight = make_parameter((out_features, in_features // tp.size), logical)
        self.bias = replicated_parameter((out_features,), init_value=0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D/t) -> residual stream (B, S or S/t, O)."""
        if self.tp.group is None:
            return F.linear(x, self.weight, self.bias)
        y = leave(F.linear(x, self.weight), self.tp, sequence=self.sequence)
        return y if self.bias is None else y + whole(self.bias, self.tp, sequence=self.sequence)


class ReplicatedLinear(nn.Module):
    """y = x W^T + b with the whole W on every tp rank, for small layers.

    With `sequence` the input is the cut residual stream, so that gradients are summed over the parts; without it every
    tp rank computes the same.
    """

    def __init__(
        self, in_features: int, out_features: int, *, tp: AxisGroup, bias: bool, init_std: float, sequence: bool
    ) -> None:
        super().__init__()
        self.tp, self.sequence = tp, sequence
        shape = (out_features, in_features)
        self.weight = make_parameter(shape, LogicalTensor(shape, init_std=init_std))
        self.bias = replicated_parameter((out_features,), init_value=0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        bias = None if self.bias is None else whole(self.bias, self.tp, sequence=self.sequence)
        return F.linear(x, whole(self.weight, self.tp, sequence=self.sequence), bias)
