"""RMSNorm in Triton, with the sum of a residual before it. Shape: D channels; T rows of D, all dimensions before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine_kernels.triton.norm import backward, check, forward


@torch.library.custom_op("octant::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd_T)."""
    out = forward(x, None, weight_D, None, eps, centred=False)
    return out.y, out.rstd


@_rms_norm.register_fake
def _(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("octant::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, rstd_T)."""
    out = forward(x, residual, weight_D, None, eps, centred=False)
    return out.y, out.s, out.rstd  # type: ignore[return-value]  # there is a sum, since there is a residual


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rstd_T = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd_T


@torch.library.custom_op("octant::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight_D: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of s, and of the weight as (1, D)."""
    return backward(dy, ds, s, weight_D, None, rstd_T, vectors=1)


@_rms_norm_backward.register_fake
def _(dy: Tensor, ds: Tensor | None, s: Tensor, weight_D: Tensor, rstd_T: Tensor) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), weight_D.new_empty(1, weight_D.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight_D, _ = inputs
    ctx.save_for_backward(x, weight_D, output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    dx, dweight_1D = _rms_norm_backward(dy, None, *ctx.saved_tensors)
    return dx, dweight_1D[0], None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, s, rstd_T = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(s, inputs[2], rstd_T)


def _differentiate_sum(ctx: Any, dy: Tensor | None, ds: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return ds, ds, None, None
    dx, dweight_1D = _rms_norm_backward(dy, ds, *ctx.saved_tensors)
    return dx, dx, dweight_1D[0], None


_rms_norm.register_autograd(_differentiate, setup_context=_save)
_add_rms_norm.register_autograd(_differentiate_sum, setup_context=_save_sum)


class _Beside(torch.autograd.Function):
    """The norm of x, and x: the gradients of both meet in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, rstd_T = _rms_norm(x, weight_D, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight_D, rstd_T)
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dx = grads
        if dy is None:
            return dx, None, None
        dx, dweight_1D = _rms_norm_backward(dy, dx, *ctx.saved_tensors)
        return dx, dweight_1D[0], None


def rms_norm(
    x: Tensor, weight_D: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`engine_kernels.reference.norm.rms_norm` in one pass over memory, and one for its gradients.

    Kept for the backward pass: x (or s), weight and 1 / sqrt(mean(s^2) + eps) of each row, fp32. `x` and `residual`
    are copied where their rows are not evenly spaced runs of memory.

    Args:
        x: (..., D), fp32, bf16 or fp16; D at most 16384.
        weight_D: (D,), of the dtype of `x`.
        eps: added to the mean square.
        residual: of the shape and dtype of `x`; None: s = x.

    Returns:
        (..., D) in the dtype of `x`; with `residual` also s = x + residual. Contiguous.

    Raises:
        ValueError: see `engine_kernels.triton.norm.check`.
    """
    check(x, weight_D, None, residual)
    if residual is None:
        return _rms_norm(x, weight_D, eps)[0]
    return _add_rms_norm(x, residual, weight_D, eps)[:2]


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` with s, which is x itself without a residual; its gradient is added where that of the norm is made.

    Raises:
        ValueError: as `rms_norm`.
    """
    if residual is not None:
        return rms_norm(x, weight_D, eps=eps, residual=residual)  # type: ignore[return-value]  # a pair, as it has one
    check(x, weight_D, None, None)
    return _Beside.apply(x, weight_D, eps)  # type: ignore[no-any-return]
