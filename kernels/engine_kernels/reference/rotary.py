"""Rotary positions (RoFormer, arXiv 2104.09864), half-split.

Shapes: B batch, S sequence, N query heads, K key heads, H head dim; R of the H dims are turned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine_kernels.reference.same import require_floating, require_same


def check_rotary(name: str, x: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None) -> None:
    """Refuse what cannot be turned; `name` is that of `x`.

    Raises:
        ValueError: `x` is not (B, S, N, H) floating, the tables are not both fp32 (positions, R/2) with 2 <= R <= H,
            there are more places than rows of the tables and no positions, `positions_BS` is not int64 (B, S), or
            devices differ.
    """
    require_floating(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must have four dimensions, (B, S, heads, H)")
    if cos_SR.dim() != 2 or cos_SR.dtype != torch.float32 or not 0 < 2 * cos_SR.shape[-1] <= x.shape[-1]:
        rule = f"must be fp32 (positions, R/2) with 2 <= R <= H, and H of {name} is {x.shape[-1]}"
        raise ValueError(f"cos_SR is {cos_SR.dtype} of shape {tuple(cos_SR.shape)}: {rule}")
    if sin_SR.shape != cos_SR.shape:
        raise ValueError(f"sin_SR has shape {tuple(sin_SR.shape)}: must be that of cos_SR, {tuple(cos_SR.shape)}")
    require_same("sin_SR", sin_SR, "cos_SR", cos_SR)
    if cos_SR.device != x.device:
        raise ValueError(f"cos_SR is on {cos_SR.device}: must be on the device of {name}, {x.device}")
    if positions_BS is None:
        if x.shape[1] > cos_SR.shape[0]:
            raise ValueError(f"{name} has {x.shape[1]} positions: the tables have rows for {cos_SR.shape[0]}")
    elif positions_BS.dtype != torch.int64 or positions_BS.shape != x.shape[:2]:
        shape = f"{positions_BS.dtype} of shape {tuple(positions_BS.shape)}"
        raise ValueError(f"positions_BS is {shape}: must be int64 (B, S), here {tuple(x.shape[:2])}")
    elif positions_BS.device != x.device:
        raise ValueError(f"positions_BS is on {positions_BS.device}: must be on the device of {name}, {x.device}")


def check_pair(q_BSNH: Tensor, k_BSKH: Tensor) -> None:
    """Refuse queries and keys that do not belong together.

    Raises:
        ValueError: they differ in batch, sequence, head dim, dtype or device.
    """
    if k_BSKH.dim() != 4 or (*k_BSKH.shape[:2], k_BSKH.shape[3]) != (*q_BSNH.shape[:2], q_BSNH.shape[3]):
        shape = f"k_BSKH has shape {tuple(k_BSKH.shape)}"
        raise ValueError(f"{shape}: must be that of q_BSNH, {tuple(q_BSNH.shape)}, but for the number of heads")
    require_same("k_BSKH", k_BSKH, "q_BSNH", q_BSNH)


def rotate(x_BSNH: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None = None) -> Tensor:
    """Turn each pair (x_i, x_{i + R/2}) by its position's angle (arXiv 2104.09864, eq. 34); dims from R on stay.

    Args:
        x_BSNH: (B, S, N, H), floating.
        cos_SR, sin_SR: fp32 (positions, R/2) with 2 <= R <= H.
        positions_BS: rows of the tables, int64 (B, S), each in [0, positions); None: 0 to S - 1 in each row.

    Returns:
        (B, S, N, H) in the dtype of `x_BSNH`; the product is fp32 (fp64 for fp64).

    Raises:
        ValueError: see `check_rotary`.
    """
    check_rotary("x_BSNH", x_BSNH, cos_SR, sin_SR, positions_BS)
    if positions_BS is None:
        cos, sin = (t[None, : x_BSNH.shape[1], None] for t in (cos_SR, sin_SR))
    else:
        cos, sin = (t[positions_BS][:, :, None] for t in (cos_SR, sin_SR))
    turned = 2 * cos.shape[-1]
    wide = x_BSNH[..., :turned].to(torch.promote_types(x_BSNH.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    parts = [(first * cos - second * sin).to(x_BSNH.dtype), (second * cos + first * sin).to(x_BSNH.dtype)]
    return torch.cat([*parts, x_BSNH[..., turned:]], dim=-1)


def rotate_qk(
    q_BSNH: Tensor, k_BSKH: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rotate` of queries (B, S, N, H) and of keys (B, S, K, H), which share dtype and positions.

    Raises:
        ValueError: see `check_pair` and `check_rotary`.
    """
    check_pair(q_BSNH, k_BSKH)
    check_rotary("q_BSNH", q_BSNH, cos_SR, sin_SR, positions_BS)
    return rotate(q_BSNH, cos_SR, sin_SR, positions_BS), rotate(k_BSKH, cos_SR, sin_SR, positions_BS)
