"""Tensor-parallel regions and what is outside, with or without sequence parallelism (arXiv 2205.05198, section 4.2.2).

Without it the residual stream is whole on every tp rank; with it each rank holds a run of the positions, the
all-reduces become an all-gather and a reduce-scatter, and what is replicated (norms, biases of row-parallel layers,
position tables) sees one part of the positions only, so that its gradient is a partial sum.
"""

from __future__ import annotations

from torch import Tensor

from engine.dist.collectives import copy_to_axis, gather_over_axis, scatter_sum_over_axis, sum_over_axis
from engine.dist.context import AxisGroup


def enter(x: Tensor, tp: AxisGroup, *, sequence: bool, ordered: bool = True) -> Tensor:
    """The residual stream (B, L, D) -> all positions, for a layer that is cut over tp.

    They are (B, S, D), or, where `sequence` and not `ordered`, the ranks' runs one after the other, (t B, L, D).
    """
    return gather_over_axis(x, tp, 1 if ordered else 0) if sequence else copy_to_axis(x, tp)


def leave(x: Tensor, tp: AxisGroup, *, sequence: bool, ordered: bool = True) -> Tensor:
    """Partial results of a layer that is cut over tp, positions as from `enter` -> their sum, the residual stream."""
    return scatter_sum_over_axis(x, tp, 1 if ordered else 0) if sequence else sum_over_axis(x, tp)


def whole(parameter: Tensor, tp: AxisGroup, *, sequence: bool) -> Tensor:
    """A parameter that all tp ranks hold whole, for use on the residual stream; gradients are summed over the parts."""
    return copy_to_axis(parameter, tp) if sequence else parameter
