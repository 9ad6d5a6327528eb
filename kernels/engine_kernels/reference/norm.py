"""Normalisation over the last dimension, with the sum of a residual before it. Shape: D channels."""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels.reference.same import require_floating, require_same


def check_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, residual: Tensor | None) -> None:
    """Refuse what no normalisation takes.

    Raises:
        ValueError: `x` is not (..., D) floating with D >= 1, weight or bias is not (D,), residual is not of the shape
            of `x`, or dtypes or devices differ.
    """
    require_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: must be (..., D) with D >= 1")
    for name, vector in (("weight_D", weight_D), ("bias_D", bias_D)):
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}: must be (D,), here ({x.shape[-1]},)")
        require_same(name, vector, "x", x)
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}: must be that of x, {tuple(x.shape)}")
        require_same("residual", residual, "x", x)


def rms_norm(
    x: Tensor, weight_D: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """s / sqrt(mean(s^2) + eps) * weight (arXiv 1910.07467, eq. 4), s = x + residual; in fp32, in fp64 for fp64.

    Args:
        x: (..., D), floating.
        weight_D: (D,), of the dtype of `x`.
        eps: added to the mean square.
        residual: of the shape and dtype of `x`; None: s = x.

    Returns:
        (..., D) in the dtype of `x`; with `residual` also s, rounded to that dtype before it is normalised.

    Raises:
        ValueError: see `check_norm`.
    """
    check_norm(x, weight_D, None, residual)
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    y = (wide * rstd * weight_D.to(wide.dtype)).to(x.dtype)
    return y if residual is None else (y, s)


def layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """(s - mean) / sqrt(var + eps) * weight + bias (arXiv 1607.06450, eq. 3 and 4), s = x + residual.

    The variance is over D, not D - 1. Computed in fp32, in fp64 for fp64.

    Args:
        x: (..., D), floating.
        weight_D: (D,), of the dtype of `x`.
        bias_D: like `weight_D`; None: no bias.
        eps: added to the variance.
        residual: of the shape and dtype of `x`; None: s = x.

    Returns:
        (..., D) in the dtype of `x`; with `residual` also s, rounded to that dtype before it is normalised.

    Raises:
        ValueError: see `check_norm`.
    """
    check_norm(x, weight_D, bias_D, residual)
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    y = centred * rstd * weight_D.to(wide.dtype)
    if bias_D is not None:
        y = y + bias_D.to(wide.dtype)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), s)
