"""Linear layers whose three products take fp8 operands, each tensor scaled by its own largest magnitude of the moment.

Current tensorwise scaling, with e4m3 for inputs and weights and e5m2 for gradients (arXiv 2209.05433, section 3;
"hybrid" of Transformer Engine, "tensorwise" of torchao). For x (T, D) and W (O, D):

    y  = s_x s_W (x8 W8^T) + b        e4m3 x e4m3
    dx = s_g s_W (g8 W8)              e5m2 x e4m3
    dW = s_g s_x (g8^T x8)            e5m2 x e4m3

with t8 = round(t / s_t) and s_t = max|t| / (largest number of the format). Products add up in fp32 and are rounded
once, to the dtype of the layer. Kept for the backward pass are x8, one byte for each element, the weight and scales.

Plain operations, none of them in place, so that torch.compile fuses magnitudes and casts with what stands around them.
Shapes: T positions, D in, O out; M, N, K of a product.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from engine_kernels.kernels import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Both sizes of a weight are multiples of it, or the tensor cores' 16-byte rows do not come out even."""
_LEAST = 1e-30
"""Magnitudes below it count as it, so that no scale overflows fp32."""


class Product(Protocol):
    """a b^T in fp8 of row-major (M, K) and (N, K), times both scales, plus the bias (N,): (M, N) in `dtype`.

    `fast`: sums may stay in the tensor cores' own registers, which have fewer bits than fp32.
    """

    def __call__(
        self,
        a_MK: Tensor,
        b_NK: Tensor,
        a_scale: Tensor,
        b_scale: Tensor,
        *,
        dtype: torch.dtype,
        bias_N: Tensor | None = None,
        fast: bool = False,
    ) -> Tensor: ...


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What x is divided by to fill the range of `dtype`, scalar fp32; 1 for zeros.

    One NaN or infinity in x makes all of the product NaN, as no smaller number could be told from zero beside it.
    """
    largest = torch.linalg.vector_norm(x, math.inf).float()
    return torch.where(largest == 0, 1.0, largest.clamp(min=_LEAST) / torch.finfo(dtype).max)


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale rounded to `dtype`, row-major."""
    return (x.float() / scale).to(dtype).contiguous()


def emulated_product(
    a_MK: Tensor,
    b_NK: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    dtype: torch.dtype,
    bias_N: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """`Product` in fp32, on any device and with `fast` too."""
    out_MN = (a_MK.float() @ b_NK.float().t()) * (a_scale * b_scale)
    return (out_MN if bias_N is None else out_MN + bias_N.float()).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        x_TD = x.flatten(0, -2)
        x_scale, w_scale = scale_of(x_TD, E4M3), scale_of(weight, E4M3)
        x8_TD = cast(x_TD, x_scale, E4M3)
        y_TO = product(x8_TD, cast(weight, w_scale, E4M3), x_scale, w_scale, dtype=x.dtype, bias_N=bias, fast=True)
        ctx.save_for_backward(x8_TD, x_scale, weight, w_scale)
        ctx.product, ctx.has_bias = product, bias is not None
        return y_TO.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x8_TD, x_scale, weight, w_scale = ctx.saved_tensors
        grad = grads[0]
        grad_x, grad_weight = _backward(ctx.product, grad.flatten(0, -2), x8_TD, x_scale, weight, w_scale)
        grad_bias = grad.flatten(0, -2).sum(dim=0) if ctx.has_bias else None
        return grad_x.unflatten(0, grad.shape[:-1]), grad_weight, grad_bias, None


def _backward(
    product: Product, grad_TO: Tensor, x8_TD: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (T, D) and of the weight (O, D)."""
    g_scale = scale_of(grad_TO, E5M2)
    g8_TO = cast(grad_TO, g_scale, E5M2)
    w8_DO = cast(weight.t(), w_scale, E4M3)
    grad_x = product(g8_TO, w8_DO, g_scale, w_scale, dtype=grad_TO.dtype)
    grad_weight = product(_columns(g8_TO), _columns(x8_TD), g_scale, x_scale, dtype=weight.dtype)
    return grad_x, grad_weight


def _columns(x8_TD: Tensor) -> Tensor:
    """x^T, row-major, with zeros for the positions that are missing to a multiple of `MULTIPLE`: (D, T)."""
    missing = -x8_TD.shape[0] % MULTIPLE
    if missing:
        # fp8 has no padding operation of its own; its zero has no bit set.
        x8_TD = torch.nn.functional.pad(x8_TD.view(torch.uint8), (0, 0, 0, missing)).view(x8_TD.dtype)
    return x8_TD.t().contiguous()


def _apply(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = _Fp8Linear.apply(x, weight, bias, product)  # type: ignore[no-untyped-call]
    return out


def linear_with(product: Product) -> Linear:
    """The linear layer in fp8 whose products are computed by `product`."""
    return Linear(partial(_apply, product), MULTIPLE)


emulated = linear_with(emulated_product)
"""By `emulated_product`: the oracle, and what a CPU runs."""
