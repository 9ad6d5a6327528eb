"""Which overlap a tensor-parallel axis has."""

from __future__ import annotations

import torch

from engine.config.enums import TpOverlap
from engine.dist.context import AxisGroup
from engine.dist.init import has_nccl
from engine.parallel.symmetric import require_mapped


def choose_overlap(asked: TpOverlap, tp: AxisGroup, device: torch.device) -> TpOverlap:
    """What `parallel.tp_overlap` means on this axis; `none` on an axis of one rank. Collective over the axis.

    Raises:
        LaunchError: see `require_mapped`.
    """
    if tp.group is None:
        return TpOverlap.none
    if asked is TpOverlap.auto:
        sends = device.type == "cuda" and has_nccl(tp.group)
        return TpOverlap.chunked if sends else TpOverlap.none
    if asked is TpOverlap.symmetric:
        require_mapped(tp, device, "parallel.tp_overlap", "symmetric", "chunked")
    return asked
