"""Linear layers cut over an axis, with their collectives, as operations that a compiled graph holds as nodes.

Column: the outputs are cut, all positions are needed before, so with sequence parallelism they are gathered. Row: the
inputs are cut, the results are partial sums, which are added up after, with sequence parallelism scattered over the
positions too (arXiv 2205.05198, section 4.2.2). In the backward pass the collective of the input's gradient runs beside
the product for the weight's (Megatron-LM's asynchronous all-reduce). Of gathered positions only this rank's are kept
for the backward pass, which gathers them again: all would give back what sequence parallelism saves.
Shapes: B batch, S positions, L of them in the residual stream (S/t with `sequence`, else S), K columns in, O out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.dist import collectives
from engine.dist.context import AxisGroup
from engine.parallel.overlap import (
    gather_product,
    product_scatter,
    product_sum,
    start_gather,
    start_reduce_scatter,
    start_sum,
)


def _weight_grad(grad_BSO: Tensor, x_BSK: Tensor) -> Tensor:
    return grad_BSO.flatten(0, 1).t() @ x_BSK.flatten(0, 1)


@torch.library.custom_op("octant::column_linear", mutates_args=())
def _column(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, sequence: bool, overlap: str) -> Tensor:
    if not sequence:
        return F.linear(x, weight, bias)
    return gather_product(x, weight.t(), bias, group, overlap, keep=False)[0]


@_column.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, group: str, sequence: bool, overlap: str) -> Tensor:
    length = x.shape[1] * (collectives.resolve(group).size() if sequence else 1)
    return x.new_empty((x.shape[0], length, weight.shape[0]))


@torch.library.custom_op("octant::column_linear_backward", mutates_args=())
def _column_backward(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: str, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; empty where not wanted."""
    grad = grad.contiguous()
    start = start_reduce_scatter if sequence else start_sum
    arriving = start_gather(x, group, overlap) if sequence and wants_weight else lambda: x
    leaving = start(grad @ weight, group, overlap) if wants_x else lambda: grad.new_empty(0)
    grad_weight = _weight_grad(grad, arriving()) if wants_weight else grad.new_empty(0)
    return leaving(), grad_weight


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
    return grad_x if wants_x else None, grad_weight if wants_weight else None, grad_bias, None, None, None


_column.register_autograd(_grad_column, setup_context=_save_column)


@torch.library.custom_op("octant::row_linear", mutates_args=())
def _row(x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: str) -> Tensor:
    whole = product_scatter if sequence else product_sum
    return whole(x.contiguous(), weight.t(), group, overlap)


@_row.register_fake
def _(x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: str) -> Tensor:
    length = x.shape[1] // (collectives.resolve(group).size() if sequence else 1)
    return x.new_empty((x.shape[0], length, weight.shape[0]))


@torch.library.custom_op("octant::row_linear_backward", mutates_args=())
def _row_backward(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, sequence: bool, overlap: str, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; empty where not wanted."""
    whole: Tensor | None = grad.contiguous()
    grad_x = grad_weight = None
    if sequence and wants_x:
        grad_x, whole = gather_product(grad, weight, None, group, overlap, keep=wants_weight)
    elif sequence:
        whole = start_gather(grad, group, overlap)()
    elif wants_x:
        grad_x = grad @ weight
    if wants_weight:
        assert whole is not None
        grad_weight = _weight_grad(whole, x)
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
    return grad_x if wants_x else None, grad_weight if wants_weight else None, None, None, None


_row.register_autograd(_grad_row, setup_context=_save_row)


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: AxisGroup, *, sequence: bool) -> Tensor:
    """Residual stream (B, L, K) and this rank's rows of W (O/t, K) -> this rank's outputs (B, S, O/t)."""
    if not tp.name:
        return F.linear(x, weight, bias)
    out: Tensor = _column(x, weight, bias, tp.name, sequence, tp.overlap.value)
    return out


def row_linear(x: Tensor, weight: Tensor, tp: AxisGroup, *, sequence: bool) -> Tensor:
    """This rank's columns, (B, S, K/t), and those of W (O, K/t) -> residual stream (B, L, O)."""
    if not tp.name:
        return F.linear(x, weight)
    out: Tensor = _row(x, weight, tp.name, sequence, tp.overlap.value)
    return out
