"""SwiGLU and GELU in Triton. Shape: F channels; T rows of F or 2F, all dimensions before."""

# ruff: noqa: ANN001, ANN202 -- the arguments of kernels have types that Triton finds out.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.reference.activation import GeluForm, check_gelu, check_swiglu
from engine_kernels.triton.rows import as_rows, load_tile, multiprocessors, require_triton, store_tile, sum_partials


@dataclass(frozen=True, slots=True)
class _Plan:
    """The constants to tune."""

    elements: int
    """Of a tile."""
    columns: int
    """Of a tile at most."""
    warps: int

    def tiles(self, rows: int, width: int) -> tuple[dict[str, int], int, int]:
        """(constants of the kernel, tiles below each other, tiles beside each other)."""
        block = min(triton.next_power_of_2(width), self.columns)
        tile_rows = self.elements // block
        blocks = triton.cdiv(width, block)
        constants = {"F": width, "ROWS": tile_rows, "BLOCK": block, "BLOCKS": blocks, "num_warps": self.warps}
        return constants, triton.cdiv(rows, tile_rows), blocks


_SWIGLU = _Plan(elements=2048, columns=1024, warps=4)
_GELU = _Plan(elements=2048, columns=1024, warps=4)
_GELU_BACKWARD = _Plan(elements=4096, columns=1024, warps=8)
_BIAS_PROGRAMS = 3
"""Programs that sum over rows, for each multiprocessor: as many as its registers allow at a time."""
_BIAS_STAGES = 3
"""Tiles in flight of a program that sums over rows."""


@triton.jit
def _place(ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """(row, col) of this program's tile; tiles beside each other follow each other."""
    tile = tl.program_id(0) // BLOCKS
    return tile * ROWS + tl.arange(0, ROWS), tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _swiglu_kernel(
    h_ptr, out_ptr, rows, h_stride, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    row, col = _place(ROWS, BLOCK, BLOCKS)
    gate = load_tile(h_ptr, row, col, h_stride, rows, F, ROWS, True)
    up = load_tile(h_ptr, row, col, h_stride, rows, F, ROWS, True, F)
    store_tile(out_ptr, gate * tl.sigmoid(gate) * up, row, col, F, rows, F, ROWS, True)


@triton.jit
def _swiglu_backward_kernel(
    dout_ptr, h_ptr, dh_ptr, rows, dout_stride, h_stride,
    F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))."""
    row, col = _place(ROWS, BLOCK, BLOCKS)
    dout = load_tile(dout_ptr, row, col, dout_stride, rows, F, ROWS, True)
    gate = load_tile(h_ptr, row, col, h_stride, rows, F, ROWS, True)
    up = load_tile(h_ptr, row, col, h_stride, rows, F, ROWS, True, F)
    sigmoid = tl.sigmoid(gate)
    dgate = dout * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    store_tile(dh_ptr, dgate, row, col, 2 * F, rows, F, ROWS, True)
    store_tile(dh_ptr, dout * gate * sigmoid, row, col, 2 * F, rows, F, ROWS, True, F)


@triton.jit
def _gelu_parts(x, TANH: tl.constexpr, FINE: tl.constexpr):
    """(Phi(x), x Phi'(x)): the value is x times the first, the derivative their sum. FINE: to the last bits of fp32."""
    if TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u), exact in both tails, where the power of two is infinite or zero.
        square = x * x
        exponent = 2.3022081981 + 0.10294323958 * square
        # share (1 - share) is zero long before |x| = 16.
        grown = 1.5957691216057308 + 0.2140644488178 * tl.minimum(square, 256.0)
        if FINE:
            # 1 - share would keep no more of its bits than share leaves.
            power = tl.exp2(-tl.abs(x) * exponent)
            larger = tl.div_rn(tl.full(power.shape, 1.0, tl.float32), 1.0 + power)
            smaller = power * larger
            return tl.where(x < 0.0, smaller, larger), x * smaller * larger * grown
        share = 1.0 / (1.0 + tl.exp2(-x * exponent))
        return share, x * share * (1.0 - share) * grown
    bell = tl.exp2(-0.7213475204 * x * x)
    if FINE:
        share = 0.5 + 0.5 * tl.math.erf(0.7071067811865476 * x)
    else:
        # erf has as many instructions as memory leaves time for in 16 bits. Phi(-|x|) exp(x^2 / 2) is a polynomial in
        # 1 / (1 + p |x|), the form of Abramowitz and Stegun 7.1.26, fitted: Phi errs by 9e-9, its tail by 2e-5 of it.
        t = 1.0 / (1.0 + 0.34 * tl.abs(x))
        tail = -0.19503222651843638 + t * 0.04359566191662901
        tail = -0.021459930152760938 + t * (0.25413694761201105 + t * tail)
        tail = 0.13591312649838017 + t * (0.1309119887773171 + t * (0.15193444052799432 + t * tail))
        tail *= t * bell
        share = tl.where(x < 0.0, tail, 1.0 - tail)
    return share, 0.3989422804014327 * x * bell


@triton.jit
def _gelu_kernel(
    h_ptr, bias_ptr, out_ptr, rows, h_stride,
    TANH: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, col = _place(ROWS, BLOCK, BLOCKS)
    x = load_tile(h_ptr, row, col, h_stride, rows, F, ROWS, True)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, mask=col < F, other=0.0).to(tl.float32)[None, :]
    share, _ = _gelu_parts(x, TANH, h_ptr.dtype.element_ty == tl.float32)
    store_tile(out_ptr, x * share, row, col, F, rows, F, ROWS, True)


@triton.jit
def _gelu_backward_kernel(
    dout_ptr, h_ptr, bias_ptr, dh_ptr, partials_ptr, rows, groups, dout_stride, h_stride, STAGES: tl.constexpr,
    TANH: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program takes every `groups`-th tile of its columns; their sums go to its row of `partials_ptr` (groups, F)."""
    group = tl.program_id(0) // BLOCKS
    col = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=col < F, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(group, tl.cdiv(rows, ROWS), groups, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        dout = load_tile(dout_ptr, row, col, dout_stride, rows, F, ROWS, True)
        x = load_tile(h_ptr, row, col, h_stride, rows, F, ROWS, True)
        if bias_ptr is not None:
            x += bias
        share, slope = _gelu_parts(x, TANH, h_ptr.dtype.element_ty == tl.float32)
        dh = dout * (share + slope)
        store_tile(dh_ptr, dh, row, col, F, rows, F, ROWS, True)
        if bias_ptr is not None:
            dbias += dh
    if bias_ptr is not None:
        tl.store(partials_ptr + group * F + col, tl.sum(dbias, axis=0), mask=col < F)


@torch.library.custom_op("octant::swiglu", mutates_args=())
def _swiglu(h: Tensor) -> Tensor:
    out = torch.empty((*h.shape[:-1], h.shape[-1] // 2), dtype=h.dtype, device=h.device)
    if out.numel():
        h = as_rows(h)
        constants, below, beside = _SWIGLU.tiles(len(h), out.shape[-1])
        with torch.cuda.device_of(h):
            _swiglu_kernel[(below * beside,)](h, out, len(h), h.stride(0), **constants)
    return out


@_swiglu.register_fake
def _(h: Tensor) -> Tensor:
    return h.new_empty((*h.shape[:-1], h.shape[-1] // 2))


@torch.library.custom_op("octant::swiglu_backward", mutates_args=())
def _swiglu_backward(dout: Tensor, h: Tensor) -> Tensor:
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if dh.numel():
        dout, h = as_rows(dout), as_rows(h)
        constants, below, beside = _SWIGLU.tiles(len(h), dout.shape[-1])
        with torch.cuda.device_of(h):
            _swiglu_backward_kernel[(below * beside,)](dout, h, dh, len(h), dout.stride(0), h.stride(0), **constants)
    return dh


@_swiglu_backward.register_fake
def _(dout: Tensor, h: Tensor) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.custom_op("octant::gelu", mutates_args=())
def _gelu(h: Tensor, bias_F: Tensor | None, tanh: bool) -> Tensor:
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if out.numel():
        h, bias_F = as_rows(h), None if bias_F is None else bias_F.contiguous()
        constants, below, beside = _GELU.tiles(*h.shape)
        with torch.cuda.device_of(h):
            _gelu_kernel[(below * beside,)](h, bias_F, out, len(h), h.stride(0), TANH=tanh, **constants)
    return out


@_gelu.register_fake
def _(h: Tensor, bias_F: Tensor | None, tanh: bool) -> Tensor:
    return h.new_empty(h.shape)


def _launch_gelu_backward(dout: Tensor, h: Tensor, bias_F: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor | None]:
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not dh.numel():
        return dh, None if bias_F is None else torch.zeros(bias_F.shape, dtype=h.dtype, device=h.device)
    dout, h = as_rows(dout), as_rows(h)
    constants, groups, beside = _GELU_BACKWARD.tiles(*h.shape)
    partials = None
    if bias_F is not None:
        programs = _BIAS_PROGRAMS * multiprocessors(h.device)
        bias_F, groups = bias_F.contiguous(), min(groups, max(1, programs // beside))
        partials = torch.empty(groups, h.shape[1], dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        _gelu_backward_kernel[(groups * beside,)](
            dout, h, bias_F, dh, partials, len(h), groups, dout.stride(0), h.stride(0),
            STAGES=1 if bias_F is None else _BIAS_STAGES, TANH=tanh, **constants,
        )  # fmt: skip
    return dh, None if partials is None else sum_partials(partials, h.dtype)


@torch.library.custom_op("octant::gelu_backward", mutates_args=())
def _gelu_backward(dout: Tensor, h: Tensor, tanh: bool) -> Tensor:
    return _launch_gelu_backward(dout, h, None, tanh)[0]


@_gelu_backward.register_fake
def _(dout: Tensor, h: Tensor, tanh: bool) -> Tensor:
    return h.new_empty(h.shape)


@torch.library.custom_op("octant::gelu_bias_backward", mutates_args=())
def _gelu_bias_backward(dout: Tensor, h: Tensor, bias_F: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], _launch_gelu_backward(dout, h, bias_F, tanh))


@_gelu_bias_backward.register_fake
def _(dout: Tensor, h: Tensor, bias_F: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), bias_F.new_empty(bias_F.shape)


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate_swiglu(ctx: Any, dout: Tensor) -> Tensor:
    return _swiglu_backward(dout, *ctx.saved_tensors)


def _save_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, bias_F, ctx.tanh = inputs
    ctx.save_for_backward(h, bias_F)


def _differentiate_gelu(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    h, bias_F = ctx.saved_tensors
    if bias_F is None:
        return _gelu_backward(dout, h, ctx.tanh), None, None
    return *_gelu_bias_backward(dout, h, bias_F, ctx.tanh), None


_swiglu.register_autograd(_differentiate_swiglu, setup_context=_save_swiglu)
_gelu.register_autograd(_differentiate_gelu, setup_context=_save_gelu)


def swiglu(h: Tensor) -> Tensor:
    """`engine_kernels.reference.activation.swiglu` in one pass over memory, and one for its gradient.

    `h` is kept for the backward pass, and copied where its rows are not evenly spaced runs of memory.

    Args:
        h: (..., 2F), fp32, bf16 or fp16, the gate first.

    Returns:
        (..., F) in the dtype of `h`, contiguous.

    Raises:
        ValueError: see `check_swiglu` and `require_triton`.
    """
    check_swiglu(h)
    require_triton("h", h)
    return cast(Tensor, _swiglu(h))


def gelu(h: Tensor, bias_F: Tensor | None = None, *, approximate: GeluForm) -> Tensor:
    """`engine_kernels.reference.activation.gelu` in one pass over memory, and one for its gradients.

    `h` and the bias are kept for the backward pass; `h` is copied where its rows are not evenly spaced runs of memory.

    Args:
        h: (..., F), fp32, bf16 or fp16.
        bias_F: (F,), of the dtype of `h`; None: no bias.
        approximate: "none" by erf, or "tanh".

    Returns:
        (..., F) in the dtype of `h`, contiguous.

    Raises:
        ValueError: see `check_gelu` and `require_triton`.
    """
    check_gelu(h, bias_F, approximate)
    require_triton("h", h)
    return cast(Tensor, _gelu(h, bias_F, approximate == "tanh"))
