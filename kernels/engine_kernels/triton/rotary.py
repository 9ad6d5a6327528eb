"""Rotary positions in Triton, of queries and keys in one launch.

Shapes: B batch, S sequence, N query heads, K key heads, H head dim; R of the H dims are turned.
"""

# ruff: noqa: ANN001, ANN202 -- the arguments of kernels have types that Triton finds out.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.reference.rotary import check_pair, check_rotary
from engine_kernels.triton.rows import require_triton

# The constants to tune: pairs of a tile (tokens * heads * R/2, or half its dims that stay), heads at most, warps.
_PAIRS, _HEADS, _WARPS = 2048, 32, 4


@triton.jit
def _turn(
    x_ptr, out_ptr, x_at, out_at, head_stride, cos, sin, token_mask,
    HEADS: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, TILE_HEADS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """All heads of some tokens, which start at `x_at` and `out_at`, (tokens, 1, 1); cos, sin (tokens, 1, R/2)."""
    pair = tl.arange(0, PAIRS)[None, None, :]
    for start in range(0, HEADS, TILE_HEADS):
        head = (start + tl.arange(0, TILE_HEADS))[None, :, None]
        from_ptr, to_ptr = x_ptr + x_at + head.to(tl.int64) * head_stride, out_ptr + out_at + head * H
        inside = token_mask & (head < HEADS)
        mask = inside & (pair < HALF)
        first = tl.load(from_ptr + pair, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(from_ptr + HALF + pair, mask=mask, other=0.0).to(tl.float32)
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        tl.store(to_ptr + pair, (first * cos - second * sin).to(dtype), mask=mask)
        tl.store(to_ptr + HALF + pair, (second * cos + first * sin).to(dtype), mask=mask)
        if 2 * HALF < H:
            rest = 2 * HALF + tl.arange(0, REST)[None, None, :]
            kept = inside & (rest < H)
            tl.store(to_ptr + rest, tl.load(from_ptr + rest, mask=kept), mask=kept)


@triton.jit
def _kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, tokens, length, table,
    q_row_stride, q_stride, q_head_stride, k_row_stride, k_stride, k_head_stride,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """BACK: by the negative angle. Rows of the tables outside of them are NaN."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    token_mask = token < tokens
    row, column = (token // length).to(tl.int64), (token % length).to(tl.int64)
    position = column
    if positions_ptr is not None:
        position = tl.load(positions_ptr + token, mask=token_mask, other=0)
    pair = tl.arange(0, PAIRS)[None, None, :]
    mask = token_mask & (pair < HALF) & (position >= 0) & (position < table)
    cos = tl.load(cos_ptr + position * HALF + pair, mask=mask, other=float("nan"))
    sin = tl.load(sin_ptr + position * HALF + pair, mask=mask, other=float("nan"))
    if BACK:
        sin = -sin
    out_at = token.to(tl.int64) * H
    _turn(
        q_ptr, q_out_ptr, row * q_row_stride + column * q_stride, out_at * N, q_head_stride, cos, sin, token_mask,
        N, H, HALF, TILE_N, PAIRS, REST,
    )  # fmt: skip
    if k_ptr is not None:
        _turn(
            k_ptr, k_out_ptr, row * k_row_stride + column * k_stride, out_at * K, k_head_stride, cos, sin, token_mask,
            K, H, HALF, TILE_K, PAIRS, REST,
        )  # fmt: skip


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    q_BSNH: Tensor, k_BSKH: Tensor | None, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None, back: bool
) -> tuple[Tensor, Tensor | None]:
    q = _readable(q_BSNH)
    k = None if k_BSKH is None else _readable(k_BSKH)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = None if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    rows, length, heads, width = q.shape
    k_heads = 0 if k is None else k.shape[2]
    if rows * length * (heads + k_heads) == 0:
        return q_out, k_out
    half = cos_SR.shape[1]
    pairs = triton.next_power_of_2(half)
    tile_n, tile_k = (min(triton.next_power_of_2(max(n, 1)), _HEADS) for n in (heads, k_heads))
    rest = triton.next_power_of_2(max(width - 2 * half, 1))
    tokens = max(1, _PAIRS // (max(tile_n, tile_k) * max(pairs, rest // 2)))
    with torch.cuda.device_of(q):
        _kernel[(triton.cdiv(rows * length, tokens),)](
            q, k, q_out, k_out, cos_SR.contiguous(), sin_SR.contiguous(),
            None if positions_BS is None else positions_BS.contiguous(), rows * length, length, cos_SR.shape[0],
            *q.stride()[:3], *((0, 0, 0) if k is None else k.stride()[:3]),
            N=heads, K=k_heads, H=width, HALF=half, TOKENS=tokens, TILE_N=tile_n, TILE_K=tile_k, PAIRS=pairs,
            REST=rest, BACK=back, num_warps=_WARPS,
        )  # fmt: skip
    return q_out, k_out


@torch.library.custom_op("octant::rotate", mutates_args=())
def _rotate(x_BSNH: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None, back: bool) -> Tensor:
    return _launch(x_BSNH, None, cos_SR, sin_SR, positions_BS, back)[0]


@_rotate.register_fake
def _(x_BSNH: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None, back: bool) -> Tensor:
    return x_BSNH.new_empty(x_BSNH.shape)


@torch.library.custom_op("octant::rotate_qk", mutates_args=())
def _rotate_qk(
    q_BSNH: Tensor, k_BSKH: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None, back: bool
) -> tuple[Tensor, Tensor]:
    return _launch(q_BSNH, k_BSKH, cos_SR, sin_SR, positions_BS, back)  # type: ignore[return-value]  # keys are given


@_rotate_qk.register_fake
def _(
    q_BSNH: Tensor, k_BSKH: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None, back: bool
) -> tuple[Tensor, Tensor]:
    return q_BSNH.new_empty(q_BSNH.shape), k_BSKH.new_empty(k_BSKH.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, cos_SR, sin_SR, positions_BS, ctx.back = inputs
    ctx.save_for_backward(cos_SR, sin_SR, positions_BS)


def _differentiate(ctx: Any, dx_BSNH: Tensor) -> tuple[Tensor | None, ...]:
    return _rotate(dx_BSNH, *ctx.saved_tensors, not ctx.back), None, None, None, None


def _differentiate_qk(ctx: Any, dq_BSNH: Tensor, dk_BSKH: Tensor) -> tuple[Tensor | None, ...]:
    return *_rotate_qk(dq_BSNH, dk_BSKH, *ctx.saved_tensors, not ctx.back), None, None, None, None


_rotate.register_autograd(_differentiate, setup_context=_save)
_rotate_qk.register_autograd(_differentiate_qk, setup_context=_save)


def rotate(x_BSNH: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None = None) -> Tensor:
    """`engine_kernels.reference.rotary.rotate` in one pass over memory; its gradient is the turn back.

    The caller guarantees that positions lie in the tables, since a look at them would wait for the device. Where one
    does not, its pairs become NaN and no other memory is read; a negative one does not count from the end.

    Args:
        x_BSNH: (B, S, N, H), fp32, bf16 or fp16, of any strides; copied only where those of H are not one.
        cos_SR, sin_SR: fp32 (positions, R/2) with 2 <= R <= H; they get no gradients.
        positions_BS: int64 (B, S); None: 0 to S - 1 in each row.

    Returns:
        (B, S, N, H) in the dtype of `x_BSNH`, contiguous.

    Raises:
        ValueError: see `check_rotary` and `require_triton`.
    """
    check_rotary("x_BSNH", x_BSNH, cos_SR, sin_SR, positions_BS)
    require_triton("x_BSNH", x_BSNH)
    return _rotate(x_BSNH, cos_SR, sin_SR, positions_BS, False)


def rotate_qk(
    q_BSNH: Tensor, k_BSKH: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rotate` of queries (B, S, N, H) and of keys (B, S, K, H) in one launch, as are their gradients.

    Both may be views of one tensor (B, S, (N + 2K) * H): strides are read.

    Raises:
        ValueError: see `check_pair`, `check_rotary` and `require_triton`.
    """
    check_pair(q_BSNH, k_BSKH)
    check_rotary("q_BSNH", q_BSNH, cos_SR, sin_SR, positions_BS)
    require_triton("q_BSNH", q_BSNH)
    return _rotate_qk(q_BSNH, k_BSKH, cos_SR, sin_SR, positions_BS, False)
