"""Products in fp8 by torch._scaled_mm: cuBLASLt's, on tensor cores that have the formats."""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels.reference.fp8_linear import linear_with
from engine_kernels.registry import Situation

_LEAST = (8, 9)
"""Compute capability of the first GPUs with fp8 tensor cores (Ada)."""


def scaled_product(
    a_MK: Tensor,
    b_NK: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    dtype: torch.dtype,
    bias_N: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """`Product` of `engine_kernels.reference.fp8_linear`; N and K are multiples of 16."""
    return torch._scaled_mm(
        a_MK, b_NK.t(), scale_a=a_scale, scale_b=b_scale, bias=bias_N, out_dtype=dtype, use_fast_accum=fast
    )


def supports(s: Situation) -> str | None:
    """None on GPUs with fp8 tensor cores, for bf16 layers."""
    if s.device.type != "cuda":
        return "needs a CUDA device"
    if (here := torch.cuda.get_device_capability(s.device)) < _LEAST:
        return "needs compute capability {}.{} for tensor cores with fp8, and this GPU has {}.{}".format(*_LEAST, *here)
    return None if s.dtype is torch.bfloat16 else f"gives bf16, not {s.dtype}"


linear = linear_with(scaled_product)
