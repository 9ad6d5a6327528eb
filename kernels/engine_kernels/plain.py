"""Operations of a model as torch has them, which torch.compile fuses with what stands around them.

Rounded as torch does in the dtype of the input, where `engine_kernels.reference` computes in fp32 throughout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine_kernels.reference.activation import GeluForm


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), (..., D) -> (..., D)."""
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias (arXiv 1607.06450), (..., D) -> (..., D)."""
    return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of s = x + residual, and s; without a residual s = x. All (..., D)."""
    s = x if residual is None else x + residual
    return rms_norm(s, weight_D, eps=eps), s


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of s = x + residual, and s; without a residual s = x. All (..., D)."""
    s = x if residual is None else x + residual
    return layer_norm(s, weight_D, bias_D, eps=eps), s


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * up with (gate, up) the halves of `h` (arXiv 2002.05202), (..., 2F) -> (..., F)."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(h: Tensor, *, approximate: GeluForm) -> Tensor:
    """x Phi(x) (arXiv 1606.08415), or its tanh form, (..., F) -> (..., F)."""
    return F.gelu(h, approximate=approximate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (..., D) and (O, D) -> (..., O)."""
    return F.linear(x, weight, bias)


def accumulate(total: Tensor, x: Tensor, *, first: bool) -> None:
    """`total` = `x` if `first`, else `total` + `x`, any dtypes; sums of fp32 and 16 bits are rounded once."""
    if first:
        total.copy_(x)
    else:
        total.add_(x)
