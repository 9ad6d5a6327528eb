"""Ulysses context parallelism (arXiv 2309.14509): positions are cut outside attention, heads inside.

Shapes: B batch, S all positions, L = S / c this rank's run of them, N query heads, K key/value heads of this tp rank.
"""

from __future__ import annotations

from torch import Tensor

from engine.dist.collectives import exchange_over_axis
from engine.dist.context import AxisGroup


def to_heads(q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, cp: AxisGroup) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of some positions -> some heads, N/c and max(K/c, 1), of all positions.

    With fewer key/value heads than ranks each is repeated for the ranks whose query heads it serves.
    """
    if cp.group is None:
        return q_BLNH, k_BLKH, v_BLKH
    kv_heads = k_BLKH.shape[2]
    if kv_heads < cp.size:
        k_BLKH, v_BLKH = (t.repeat_interleave(cp.size // kv_heads, dim=2) for t in (k_BLKH, v_BLKH))
    q_BSNH, k_BSKH, v_BSKH = (exchange_over_axis(t, cp, split_dim=2, gather_dim=1) for t in (q_BLNH, k_BLKH, v_BLKH))
    return q_BSNH, k_BSKH, v_BSKH


def to_positions(o_BSNH: Tensor, cp: AxisGroup) -> Tensor:
    """Some heads of all positions -> all heads of this rank's positions."""
    return exchange_over_axis(o_BSNH, cp, split_dim=1, gather_dim=2)
