"""Activations between the two matrices of the feed-forward. Shape: F channels."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_kernels.reference.same import require_floating, require_same

GeluForm = Literal["none", "tanh"]


def check_swiglu(h: Tensor) -> None:
    """Refuse what has no two halves.

    Raises:
        ValueError: `h` is not (..., 2F) floating.
    """
    require_floating("h", h)
    if h.dim() == 0 or h.shape[-1] % 2:
        raise ValueError(f"h has shape {tuple(h.shape)}: must be (..., 2F), the last dimension even")


def check_gelu(h: Tensor, bias_F: Tensor | None, approximate: str) -> None:
    """Refuse what GELU does not take.

    Raises:
        ValueError: `h` is not (..., F) floating, `bias_F` is not (F,) of its dtype on its device, or `approximate` is
            neither "none" nor "tanh".
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}: must be 'none' or 'tanh'")
    require_floating("h", h)
    if h.dim() == 0:
        raise ValueError("h has shape (): must be (..., F)")
    if bias_F is not None:
        if bias_F.shape != h.shape[-1:]:
            raise ValueError(f"bias_F has shape {tuple(bias_F.shape)}: must be (F,), here ({h.shape[-1]},)")
        require_same("bias_F", bias_F, "h", h)


def swiglu(h: Tensor) -> Tensor:
    """silu(gate) * up with (gate, up) the halves of `h` (arXiv 2002.05202, eq. 5), in fp32 (fp64 for fp64).

    Args:
        h: (..., 2F), floating, the gate first.

    Returns:
        (..., F) in the dtype of `h`.

    Raises:
        ValueError: see `check_swiglu`.
    """
    check_swiglu(h)
    gate, up = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(h.dtype)


def gelu(h: Tensor, bias_F: Tensor | None = None, *, approximate: GeluForm) -> Tensor:
    """x Phi(x) with x = h + bias (arXiv 1606.08415, eq. 1), or its tanh form (section 2), in fp32 (fp64 for fp64).

    The sum with the bias is not rounded.

    Args:
        h: (..., F), floating.
        bias_F: (F,), of the dtype of `h`; None: no bias.
        approximate: "none": Phi by erf. "tanh": (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 for it.

    Returns:
        (..., F) in the dtype of `h`.

    Raises:
        ValueError: see `check_gelu`.
    """
    check_gelu(h, bias_F, approximate)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    if bias_F is not None:
        wide = wide + bias_F.to(wide.dtype)
    return F.gelu(wide, approximate=approximate).to(h.dtype)
