"""The kernels of RMSNorm and LayerNorm: whole rows in registers, fp32 inside. Shape: D channels.

A program walks over tiles of rows and keeps the weight, and in the backward pass its part of the weight's gradient, in
registers. Both passes are bound by memory.
"""

# ruff: noqa: ANN001, ANN202 -- the arguments of kernels have types that Triton finds out.
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.reference.norm import check_norm
from engine_kernels.triton.rows import (
    as_rows,
    load_tile,
    multiprocessors,
    require_triton,
    store_tile,
    sum_partials,
)

WIDEST = 16384
"""Channels that a program keeps in registers."""


@dataclass(frozen=True, slots=True)
class _Launch:
    """How a kernel is launched for rows of some width."""

    block: int
    rows: int
    warps: int
    programs: int
    stages: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """The constants to tune."""

    elements: int
    """Of a tile for a thread, unless the tile is of the narrowest or widest program."""
    threads: int
    """Of a multiprocessor, in all its programs: as many as their registers allow at a time."""
    stages: int
    """Tiles that a program has in flight, all but one in shared memory; one: loads are not ahead of use."""

    def launch(self, x: Tensor, tensors: int) -> _Launch:
        """For the rows of `x`, of which a tile reads those of as many `tensors`."""
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        warps = min(max(block // (32 * self.elements), 4), 32)
        tile_rows = max(1, self.elements * 32 * warps // block)
        resident = max(1, self.threads // (32 * warps))
        programs = min(multiprocessors(x.device) * resident, triton.cdiv(x.numel() // width, tile_rows))
        fit = _SHARED // (resident * tensors * tile_rows * block * x.element_size())
        return _Launch(block, tile_rows, warps, programs, min(self.stages, 1 + fit))


_SHARED = 160 * 1024
"""Bytes of a multiprocessor's shared memory that tiles in flight may take."""
_FORWARD = _Plan(elements=16, threads=1024, stages=3)
_BACKWARD = _Plan(elements=16, threads=512, stages=3)


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr, rows, x_stride, residual_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """LayerNorm where there is `mean_ptr`, else RMSNorm."""
    MASKED: tl.constexpr = D != BLOCK
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        x = load_tile(x_ptr, row, col, x_stride, rows, D, ROWS, MASKED)
        if residual_ptr is not None:
            x += load_tile(residual_ptr, row, col, residual_stride, rows, D, ROWS, MASKED)
            store_tile(s_ptr, x, row, col, D, rows, D, ROWS, MASKED)
            x = x.to(s_ptr.dtype.element_ty).to(tl.float32)
        if mean_ptr is not None:
            mean = tl.sum(x, axis=1) / D
            tl.store(mean_ptr + row, mean, mask=row < rows)
            x -= mean[:, None]
            if MASKED:
                x = tl.where((col < D)[None, :], x, 0.0)
        # Rounded once: where a row is narrow its gradient is what rounding leaves.
        root = tl.sqrt_rn(tl.sum(x * x, axis=1) / D + eps)
        rstd = tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
        y = x * rstd[:, None] * weight[None, :]
        if bias_ptr is not None:
            y += bias[None, :]
        store_tile(y_ptr, y, row, col, D, rows, D, ROWS, MASKED)


@triton.jit
def _backward_kernel(
    dy_ptr, ds_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partials_ptr, rows, dy_stride, ds_stride, x_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """With n = (x - mean) rstd, g = dy weight: dx = rstd (g - mean(g) - n mean(n g)) + ds, without mean(g) in RMSNorm.

    A program's sums of dy n, and of dy where VECTORS is two, go to its rows of `partials_ptr`.
    """
    MASKED: tl.constexpr = D != BLOCK
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        n = load_tile(x_ptr, row, col, x_stride, rows, D, ROWS, MASKED)
        dy = load_tile(dy_ptr, row, col, dy_stride, rows, D, ROWS, MASKED)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        if mean_ptr is not None:
            n -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        # Outside of D there is something other than zero here, but dy is zero there.
        n *= rstd[:, None]
        dweight += dy * n
        if VECTORS == 2:
            dbias += dy
        g = dy * weight[None, :]
        dx = g - n * (tl.sum(g * n, axis=1) / D)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(g, axis=1) / D)[:, None]
        dx *= rstd[:, None]
        if ds_ptr is not None:
            dx += load_tile(ds_ptr, row, col, ds_stride, rows, D, ROWS, MASKED)
        store_tile(dx_ptr, dx, row, col, D, rows, D, ROWS, MASKED)
    out = partials_ptr + tl.program_id(0) * VECTORS * D + col
    tl.store(out, tl.sum(dweight, axis=0), mask=col < D)
    if VECTORS == 2:
        tl.store(out + D, tl.sum(dbias, axis=0), mask=col < D)


def check(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, residual: Tensor | None) -> None:
    """Refuse what these kernels do not take.

    Raises:
        ValueError: see `check_norm` and `require_triton`, or `x` has more than `WIDEST` channels.
    """
    check_norm(x, weight_D, bias_D, residual)
    require_triton("x", x)
    if x.shape[-1] > WIDEST:
        raise ValueError(f"x has {x.shape[-1]} channels: Triton's normalisations take up to {WIDEST}")


@dataclass(frozen=True, slots=True)
class Normed:
    """What the forward pass makes; `s` is None without a residual, and `mean` in RMSNorm. Statistics: fp32 (rows,)."""

    y: Tensor
    s: Tensor | None
    mean: Tensor | None
    rstd: Tensor


def forward(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, *, centred: bool
) -> Normed:
    """LayerNorm where `centred`, else RMSNorm, of x or of x + residual; see `engine_kernels.reference.norm`."""
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device) if centred else None
    if rows:
        x, residual = as_rows(x), None if residual is None else as_rows(residual)
        launch = _FORWARD.launch(x, 1 if residual is None else 2)
        with torch.cuda.device_of(x):
            _forward_kernel[(launch.programs,)](
                x, residual, weight_D.contiguous(), None if bias_D is None else bias_D.contiguous(), y, s, mean, rstd,
                rows, x.stride(0), 0 if residual is None else residual.stride(0), eps,
                D=width, BLOCK=launch.block, ROWS=launch.rows, STAGES=launch.stages, num_warps=launch.warps,
            )  # fmt: skip
    return Normed(y, s, mean, rstd)


def backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, weight_D: Tensor, mean: Tensor | None, rstd: Tensor, *, vectors: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x, contiguous, and of (weight, bias) where `vectors` is two, of (weight,) where it is one.

    Args:
        ds: gradient of x that does not come through the norm; None: there is none.
        x: what was normalised.
    """
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows:
        return dx, torch.zeros(vectors, width, dtype=weight_D.dtype, device=x.device)
    dy, x, ds = as_rows(dy), as_rows(x), None if ds is None else as_rows(ds)
    launch = _BACKWARD.launch(x, 2 if ds is None else 3)
    partials = torch.empty(launch.programs, vectors, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(launch.programs,)](
            dy, ds, x, weight_D.contiguous(), mean, rstd, dx, partials,
            rows, dy.stride(0), 0 if ds is None else ds.stride(0), x.stride(0), D=width, BLOCK=launch.block,
            ROWS=launch.rows, STAGES=launch.stages, VECTORS=vectors, num_warps=launch.warps,
        )  # fmt: skip
    return dx, sum_partials(partials, weight_D.dtype)
