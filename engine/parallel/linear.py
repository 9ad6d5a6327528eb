"""Linear layers cut over the tensor-parallel axis. Shapes: D in, O out, t ranks on the axis; G, P of the side that is
cut are B, S or, with sequence parallelism where order does not matter, t B, S/t (see `engine.parallel.split_linear`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from engine.dist.context import AxisGroup
from engine.parallel.logical import LogicalTensor, make_parameter, replicated_parameter
from engine.parallel.sequence import enter, leave, whole
from engine.parallel.split_linear import column_linear, row_linear
from engine_kernels.ops import PLAIN_LINEAR, Linear


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the outputs cut: each rank holds O/t rows of W and computes O/t columns of y.

    Args:
        in_features, out_features: logical sizes D and O.
        segments: sizes of fused parts of O (query, key and value, say), each cut on its own. Default: one part.
        init_std: standard deviation of the initial weight.
        sequence: inputs hold this rank's part of the positions (see `engine.parallel.sequence`).
        ordered: outputs are whole sequences, which what looks at single positions has no need of.
        how: who multiplies; torch where it does not take the sizes of this rank's slice.
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
        ordered: bool = True,
        how: Linear = PLAIN_LINEAR,
    ) -> None:
        super().__init__()
        self.tp, self.sequence, self.ordered = tp, sequence, ordered
        self.how = how.of_sizes(out_features // tp.size, in_features)
        self.plain = self.how is PLAIN_LINEAR
        weight = LogicalTensor((out_features, in_features), dim=0, segments=segments, init_std=init_std)
        self.weight = make_parameter((out_features // tp.size, in_features), weight)
        self.bias: nn.Parameter | None = None
        if bias:
            logical = LogicalTensor((out_features,), dim=0, segments=segments, decay=False)
            self.bias = make_parameter((out_features // tp.size,), logical)

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream (B, S or S/t, D) -> (G, P, O/t)."""
        if self.plain:
            return column_linear(x, self.weight, self.bias, self.tp, sequence=self.sequence, ordered=self.ordered)
        inside = enter(x, self.tp, sequence=self.sequence, ordered=self.ordered)
        return self.how.linear(inside, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the inputs cut: each rank holds D/t columns of W; partial results are summed over the axis.

    The bias is whole on every rank and added once, after the sum. `how` as for `ColumnParallelLinear`,
    and `ordered` of the inputs.
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
        ordered: bool = True,
        how: Linear = PLAIN_LINEAR,
    ) -> None:
        super().__init__()
        self.tp, self.sequence, self.ordered = tp, sequence, ordered
        self.how = how.of_sizes(out_features, in_features // tp.size)
        self.plain = self.how is PLAIN_LINEAR
        logical = LogicalTensor((out_features, in_features), dim=1, init_std=init_std)
        self.weight = make_parameter((out_features, in_features // tp.size), logical)
        self.bias = replicated_parameter((out_features,), init_value=0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(G, P, D/t) -> residual stream (B, S or S/t, O)."""
        if self.tp.group is None:
            return self.how.linear(x, self.weight, self.bias)
        if self.plain:
            y = row_linear(x, self.weight, self.tp, sequence=self.sequence, ordered=self.ordered)
        else:
            y = leave(self.how.linear(x, self.weight), self.tp, sequence=self.sequence, ordered=self.ordered)
        return y if self.bias is None else y + whole(self.bias, self.tp, sequence=self.sequence)


class ReplicatedLinear(nn.Module):
    """y = x W^T + b with the whole W on every tp rank, for small layers, which multiply in the dtype of the run.

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
