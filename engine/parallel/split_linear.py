"""Linear layers cut over an axis, with their collectives, as operations that a compiled graph holds as nodes.

Column: the outputs are cut, all positions are needed before, so with sequence parallelism they are gathered. Row: the
inputs are cut, the results are partial sums, which are added up after, with sequence parallelism scattered over the
positions too (arXiv 2205.05198, section 4.2.2). In the backward pass the collective of the input's gradient runs beside
the product for the weight's (Megatron-LM's asynchronous all-reduce). Of gathered positions only this rank's are kept
for the backward pass, which gathers them again: all would give back what sequence parallelism saves.

The cut side, a column layer's output or a row layer's input, holds gathered positions. They arrive as the ranks' runs,
one after the other, and stay so where what is between the layers looks at single positions, as a feed-forward does.
With `ordered` the cut side is whole sequences: it is copied there, as mostly the narrower one of the layer's two sides.
Shapes: B batch, S positions, L of them in the residual stream (S/t with `sequence`, else S), K columns in, O out; G, P
of the cut side are B, S or, with `sequence` and not `ordered`, t B, L.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.dist import collectives
from engine.dist.collectives import packed
from engine.dist.context import AxisGroup
from engine.parallel.overlap import (
    gather_product,
    product_scatter,
    product_sum,
    start_gather,
    start_reduce_scatter,
    start_sum,
)


def _runs(x_BSK: Tensor, ranks: int, ordered: bool) -> Tensor:
    """The cut side's rows in rank order, (t B L, K)."""
    if not ordered:
        return x_BSK.flatten(0, 1)
    batch, positions, width = x_BSK.shape
    cut = x_BSK.contiguous().view(batch, ranks, positions // ranks, width)
    return packed(cut.transpose(0, 1)).flatten(0, 2)


def _cut_side(rows: Tensor, residual: Tensor, ordered: bool) -> Tensor:
    """Rows in rank order of the positions of which `residual`, (B, L, ...), is this rank's run -> (G, P, K)."""
    batch, length, width = *residual.shape[:2], rows.shape[1]
    if not ordered:
        return rows.view(-1, length, width)
    return packed(rows.view(-1, batch, length, width).transpose(0, 1)).flatten(1, 2)


@torch.library.custom_op("octant::column_linear", mutates_args=())
def _column(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, sequence: bool, ordered: bool, overlap: str
) -> Tensor:
    if not sequence:
        return F.linear(x, weight, bias)
    rows, _ = gather_product(x.flatten(0, 1), weight.t(), bias, group, overlap, keep=False)
    return _cut_side(rows, x, ordered)


@_column.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: str, sequence: bool, ordered: bool, overlap: str
) -> Tensor:
    (batch, length, _), ranks = x.shape, collectives.resolve(group).size() if sequence else 1
    shape = (batch, ranks * length) if ordered else (ranks * batch, length)
    return x.new_empty((*shape, weight.shape[0]))


@torch.library.custom_op("octant::column_linear_backward", mutates_args=())
def _column_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    group: str,
    sequence: bool,
    ordered: bool,
    overlap: str,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; empty where not wanted."""
    start = start_reduce_scatter if sequence else start_sum
    mine = x.flatten(0, 1)
    arriving = start_gather(mine, group, overlap) if sequence and wants_weight else lambda: mine
    rows = _runs(grad, collectives.resolve(group).size(), sequence and ordered)
    leaving = start(rows @ weight, group, overlap) if wants_x else lambda: grad.new_empty(0)
    grad_weight = rows.t() @ arriving() if wants_weight else grad.new_empty(0)
    return leaving().view(x.shape if wants_x else 0), grad_weight


def _gradients_like(x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if wants_x else 0), weight.new_empty(weight.shape if wants_weight else 0)


@_column_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _gradients_like(x, weight, *rest[-2:])


def _save_column(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.call = inputs
    ctx.save_for_backward(x, weight)


def _grad_column(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grad_x, grad_weight = _column_backward(grad, x, weight, *ctx.call, wants_x, wants_weight)
    grad_bias = grad.sum(dim=(0, 1)) if wants_bias else None
    return grad_x if wants_x else None, grad_weight if wants_weight else None, grad_bias, *[None] * len(ctx.call)


_column.register_autograd(_grad_column, setup_context=_save_column)


@torch.library.custom_op("octant::row_linear", mutates_args=())
def _row(x: Tensor, weight: Tensor, group: str, sequence: bool, ordered: bool, overlap: str) -> Tensor:
    ranks = collectives.resolve(group).size()
    whole = product_scatter if sequence else product_sum
    rows = whole(_runs(x, ranks, sequence and ordered), weight.t(), group, overlap)
    return rows.view(*_residual(x, ranks if sequence else 1, ordered), -1)


def _residual(x: Tensor, ranks: int, ordered: bool) -> tuple[int, int]:
    """B and L of the residual stream whose cut side is `x`, (G, P, K)."""
    batch, positions, _ = x.shape
    return (batch, positions // ranks) if ordered else (batch // ranks, positions)


@_row.register_fake
def _(x: Tensor, weight: Tensor, group: str, sequence: bool, ordered: bool, overlap: str) -> Tensor:
    ranks = collectives.resolve(group).size() if sequence else 1
    return x.new_empty((*_residual(x, ranks, ordered), weight.shape[0]))


@torch.library.custom_op("octant::row_linear_backward", mutates_args=())
def _row_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    group: str,
    sequence: bool,
    ordered: bool,
    overlap: str,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; empty where not wanted."""
    whole: Tensor | None = grad.flatten(0, 1)
    grad_x = grad_weight = None
    if sequence and wants_x:
        grad_x, whole = gather_product(grad.flatten(0, 1), weight, None, group, overlap, keep=wants_weight)
        grad_x = _cut_side(grad_x, grad, ordered)
    elif sequence:
        whole = start_gather(grad.flatten(0, 1), group, overlap)()
    elif wants_x:
        grad_x = grad @ weight
    if wants_weight:
        assert whole is not None
        grad_weight = whole.t() @ _runs(x, collectives.resolve(group).size(), sequence and ordered)
    return tuple(x.new_empty(0) if g is None else g for g in (grad_x, grad_weight))  # type: ignore[return-value]


@_row_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _gradients_like(x, weight, *rest[-2:])


def _save_row(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.call = inputs
    ctx.save_for_backward(x, weight)


def _grad_row(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = _row_backward(grad, x, weight, *ctx.call, wants_x, wants_weight)
    return grad_x if wants_x else None, grad_weight if wants_weight else None, *[None] * len(ctx.call)


_row.register_autograd(_grad_row, setup_context=_save_row)


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tp: AxisGroup, *, sequence: bool, ordered: bool = True
) -> Tensor:
    """Residual stream (B, L, K) and this rank's rows of W (O/t, K) -> this rank's outputs (G, P, O/t)."""
    if not tp.name:
        return F.linear(x, weight, bias)
    out: Tensor = _column(x, weight, bias, tp.name, sequence, ordered, tp.overlap.value)
    return out


def row_linear(x: Tensor, weight: Tensor, tp: AxisGroup, *, sequence: bool, ordered: bool = True) -> Tensor:
    """This rank's columns, (G, P, K/t), and those of W (O, K/t) -> residual stream (B, L, O)."""
    if not tp.name:
        return F.linear(x, weight)
    out: Tensor = _row(x, weight, tp.name, sequence, ordered, tp.overlap.value)
    return out
