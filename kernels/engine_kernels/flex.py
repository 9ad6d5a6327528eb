"""torch's FlexAttention, compiled (https://pytorch.org/blog/flexattention): causal, full and sliding windows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from engine_kernels.registry import Situation
from engine_kernels.sdpa import on_gpu


def flex_supports(s: Situation) -> str | None:
    """Why FlexAttention cannot run."""
    if (reason := on_gpu(s)) is not None:
        return reason
    if s.dropout:
        return "drops no attention weights"
    if s.documents or (s.padded and not s.causal):
        return "would need a new block mask for every micro-batch"
    if s.head_dim < 16 or s.head_dim & (s.head_dim - 1) or s.head_dim > 256:
        return f"takes head dims that are powers of two from 16 to 256, not {s.head_dim}"
    return None


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _mask(length: int, causal: bool, window: int | None, device: torch.device) -> BlockMask | None:
    if not causal and window is None:
        return None
    reach = length if window is None else window

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        before = query - key < reach
        return (key <= query) & before if causal else (key - query < reach) & before

    return create_block_mask(sees, None, None, length, length, device=device)


def flex_attention_of(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    lengths_B: Tensor | None = None,
    dropout: None = None,
    documents: None = None,
    window: int | None = None,
) -> Tensor:
    """FlexAttention with a block mask that is made once for each length. `lengths_B` says nothing to causal rows."""
    mask = _mask(q_BSNH.shape[1], causal, window, q_BSNH.device)
    heads_first = (x.transpose(1, 2) for x in (q_BSNH, k_BSKH, v_BSKH))
    grouped = q_BSNH.shape[2] != k_BSKH.shape[2]
    out: Tensor = _compiled()(*heads_first, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
