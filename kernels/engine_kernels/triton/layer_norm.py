"""LayerNorm in Triton, with the sum of a residual before it. Shape: D channels; T rows of D, all dimensions before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine_kernels.triton.norm import backward, check, forward


@torch.library.custom_op("octant::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean_T, rstd_T)."""
    out = forward(x, None, weight_D, bias_D, eps, centred=True)
    return out.y, out.mean, out.rstd  # type: ignore[return-value]  # there is a mean, since rows are centred


@_layer_norm.register_fake
def _(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    mean_T, rstd_T = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean_T, rstd_T


@torch.library.custom_op("octant::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, s, mean_T, rstd_T)."""
    out = forward(x, residual, weight_D, bias_D, eps, centred=True)
    return out.y, out.s, out.mean, out.rstd  # type: ignore[return-value]


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    mean_T, rstd_T = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean_T, rstd_T


@torch.library.custom_op("octant::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight_D: Tensor, mean_T: Tensor, rstd_T: Tensor, vectors: int
) -> tuple[Tensor, Tensor]:
    """Gradients of s, and of weight and bias as (2, D), of the weight alone as (1, D)."""
    return backward(dy, ds, s, weight_D, mean_T, rstd_T, vectors=vectors)


@_layer_norm_backward.register_fake
def _(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight_D: Tensor, mean_T: Tensor, rstd_T: Tensor, vectors: int
) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), weight_D.new_empty(vectors, weight_D.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight_D, bias_D, _ = inputs
    ctx.vectors = 1 if bias_D is None else 2
    ctx.save_for_backward(x, weight_D, *output[1:])


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dvectors = _layer_norm_backward(dy, None, *ctx.saved_tensors, ctx.vectors)
    return dx, dvectors[0], dvectors[1] if ctx.vectors == 2 else None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight_D, bias_D, _ = inputs
    _, s, mean_T, rstd_T = output
    ctx.vectors = 1 if bias_D is None else 2
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(s, weight_D, mean_T, rstd_T)


def _differentiate_sum(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return ds, ds, None, None, None
    dx, dvectors = _layer_norm_backward(dy, ds, *ctx.saved_tensors, ctx.vectors)
    return dx, dx, dvectors[0], dvectors[1] if ctx.vectors == 2 else None, None


_layer_norm.register_autograd(_differentiate, setup_context=_save)
_add_layer_norm.register_autograd(_differentiate_sum, setup_context=_save_sum)


class _Beside(torch.autograd.Function):
    """The norm of x, and x: the gradients of both meet in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        y, mean_T, rstd_T = _layer_norm(x, weight_D, bias_D, eps)
        ctx.vectors = 1 if bias_D is None else 2
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight_D, mean_T, rstd_T)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dx = grads
        if dy is None:
            return dx, None, None, None
        dx, dvectors = _layer_norm_backward(dy, dx, *ctx.saved_tensors, ctx.vectors)
        return dx, dvectors[0], dvectors[1] if ctx.vectors == 2 else None, None


def layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`engine_kernels.reference.norm.layer_norm` in one pass over memory, and one for its gradients.

    Kept for the backward pass: x (or s), weight, and mean and 1 / sqrt(var + eps) of each row, fp32. `x` and `residual`
    are copied where their rows are not evenly spaced runs of memory.

    Args:
        x: (..., D), fp32, bf16 or fp16; D at most 16384.
        weight_D: (D,), of the dtype of `x`.
        bias_D: like `weight_D`; None: no bias.
        eps: added to the variance.
        residual: of the shape and dtype of `x`; None: s = x.

    Returns:
        (..., D) in the dtype of `x`; with `residual` also s = x + residual. Contiguous.

    Raises:
        ValueError: see `engine_kernels.triton.norm.check`.
    """
    check(x, weight_D, bias_D, residual)
    if residual is None:
        return _layer_norm(x, weight_D, bias_D, eps)[0]
    return _add_layer_norm(x, residual, weight_D, bias_D, eps)[:2]


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` with s, which is x itself without a residual; its gradient is added where that of the norm is made.

    Raises:
        ValueError: as `layer_norm`.
    """
    if residual is not None:
        return layer_norm(x, weight_D, bias_D, eps=eps, residual=residual)  # type: ignore[return-value]  # a pair
    check(x, weight_D, bias_D, None)
    return _Beside.apply(x, weight_D, bias_D, eps)  # type: ignore[no-any-return]
