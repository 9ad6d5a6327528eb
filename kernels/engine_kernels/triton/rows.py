"""What the kernels over rows share: views of tensors as rows, tiles of rows, and sums of partial sums.

A kernel over rows has tiles of ROWS rows and BLOCK columns, the power of two from the width on or a part of the width.
"""

# ruff: noqa: ANN001, ANN201, ANN202 -- the arguments of kernels have types that Triton finds out.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.interpreter import require_gpu

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED_MULTIPROCESSORS = 2

# The sum of partial sums: columns of a program, partial sums at a time, warps.
_SUM_COLUMNS, _SUM_ROWS, _SUM_WARPS = 32, 64, 4


def require_triton(name: str, x: Tensor) -> None:
    """Refuse what no kernel over rows can read.

    Raises:
        ValueError: `x` is not fp32, bf16 or fp16, or not on a CUDA device (nor in Triton's interpreter).
    """
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} is {x.dtype}: Triton kernels take fp32, bf16 and fp16")
    require_gpu(name, x)


def multiprocessors(device: torch.device) -> int:
    """Of `device`; a small number in the interpreter, so that programs have several tiles there too."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def as_rows(x: Tensor) -> Tensor:
    """`x` (..., D), not empty, as (rows, D) with a last stride of one: a view where strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton.jit
def load_tile(
    ptr, row, col, stride, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, START: tl.constexpr = 0
):  # fmt: skip
    """fp32 (ROWS, BLOCK) of columns START + `col` < START + WIDTH; zero outside. MASKED: some may lie outside."""
    at = ptr + row.to(tl.int64)[:, None] * stride + (START + col)[None, :]
    if ROWS == 1 and not MASKED:
        return tl.load(at).to(tl.float32)
    return tl.load(at, mask=(row < rows)[:, None] & (col < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    ptr, value, row, col, stride, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    START: tl.constexpr = 0,
):  # fmt: skip
    """The other way round, with the rounding to the dtype of `ptr`."""
    at = ptr + row.to(tl.int64)[:, None] * stride + (START + col)[None, :]
    rounded = value.to(ptr.dtype.element_ty)
    if ROWS == 1 and not MASKED:
        tl.store(at, rounded)
    else:
        tl.store(at, rounded, mask=(row < rows)[:, None] & (col < WIDTH)[None, :])


@triton.jit
def _sum_kernel(partials_ptr, sums_ptr, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (col < width)[None, :]
        total += tl.load(partials_ptr + row[:, None] * width + col[None, :], mask=mask, other=0.0)
    tl.store(sums_ptr + col, tl.sum(total, axis=0).to(sums_ptr.dtype.element_ty), mask=col < width)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of fp32 (programs, ...) over its first dimension, in an order that depends on its shape alone."""
    sums = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    width = sums.numel()
    grid = (triton.cdiv(width, _SUM_COLUMNS),)
    with torch.cuda.device_of(partials):
        _sum_kernel[grid](
            partials, sums, len(partials), width, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS, num_warps=_SUM_WARPS
        )
    return sums
