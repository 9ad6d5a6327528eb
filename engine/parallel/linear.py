"""Linear layers cut over the tensor-parallel axis. Shapes: D in, O out, t ranks on the axis."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from engine.dist.collectives import copy_to_axis, sum_over_axis
from engine.dist.context import AxisGroup
from engine.parallel.logical import LogicalTensor, make_parameter, replicated_parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the outputs cut: each rank holds O/t rows of W and computes O/t columns of y.

    Args:
        in_features, out_features: logical sizes D and O.
        segments: sizes of fused parts of O (query, key and value, say), each cut on its own. Default: one part.
        init_std: standard deviation of the initial weight.
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
    ) -> None:
        super().__init__()
        self.tp = tp
        weight = LogicalTensor((out_features, in_features), dim=0, segments=segments, init_std=init_std)
        self.weight = make_parameter((out_features // tp.size, in_features), weight)
        self.bias: nn.Parameter | None = None
        if bias:
            logical = LogicalTensor((out_features,), dim=0, segments=segments, decay=False)
            self.bias = make_parameter((out_features // tp.size,), logical)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D), equal on all ranks -> (..., O/t)."""
        return F.linear(copy_to_axis(x, self.tp), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the inputs cut: each rank holds D/t columns of W; partial results are summed over the axis.

    The bias is whole on every rank and added once, after the sum.
    """

    def __init__(self, in_features: int, out_features: int, *, tp: AxisGroup, bias: bool, init_std: float) -> None:
        super().__init__()
        self.tp = tp
        logical = LogicalTensor((out_features, in_features), dim=1, init_std=init_std)
        self.weight = make_parameter((out_features, in_features // tp.size), logical)
        self.bias = replicated_parameter((out_features,), init_value=0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D/t) -> (..., O), equal on all ranks."""
        if self.tp.group is None:
            return F.linear(x, self.weight, self.bias)
        y = sum_over_axis(F.linear(x, self.weight), self.tp)
        return y if self.bias is None else y + self.bias
