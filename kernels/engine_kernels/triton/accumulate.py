"""Gradients added to sums of another dtype, with every element read and written once, 16 bytes of fp32 at a time.

torch casts element by element where dtypes differ.
"""

# Arguments of kernels have types that no annotation says.
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels import plain

_BLOCK, _NUM_WARPS = 4096, 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _accumulate_kernel(total, x, count, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    value = tl.load(x + index, mask=inside, eviction_policy="evict_first").to(tl.float32)
    if not FIRST:
        value += tl.load(total + index, mask=inside, eviction_policy="evict_first").to(tl.float32)
    tl.store(total + index, value.to(total.dtype.element_ty), mask=inside)


@torch.no_grad()
def accumulate(total: Tensor, x: Tensor, *, first: bool) -> None:
    """`total` = `x` if `first`, else `total` + `x`, in fp32 and rounded once: the bits that torch gives.

    What the kernel does not take (equal dtypes, gaps in memory, dtypes but fp32 and those of 16 bits) torch does.

    Args:
        total: any shape; with `first` it is written and not read.
        x: as many elements.
    """
    dense = total.is_contiguous() and x.is_contiguous() and total.shape == x.shape
    if not dense or total.dtype is x.dtype or not {total.dtype, x.dtype} <= set(_DTYPES):
        plain.accumulate(total, x, first=first)
        return
    count = total.numel()
    if count:
        with torch.cuda.device_of(total):
            _accumulate_kernel[(triton.cdiv(count, _BLOCK),)](
                total, x, count, FIRST=first, BLOCK=_BLOCK, num_warps=_NUM_WARPS
            )
