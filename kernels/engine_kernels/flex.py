"""torch's FlexAttention, compiled (https://pytorch.org/blog/flexattention): causal, full and sliding windows."""

from __future__ import annotations

from functools import cache, lru_cache
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


@lru_cache(maxsize=8)
def _mask(length: int, causal: bool, window: int | None, device: torch.device) -> BlockMask | None:
    if not causal and window is None:
        return None
    reach = length if window is None else window

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        before = query - key < reach
        return (key <= query) & before if causal else (key - query < reach) & before

    # Compiled, it never holds the mask of all pairs of positions.
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(sees, None, None, length, length, device=device)


# Its mask is made once, which inside of a graph would be made at every call.
@torch.compiler.disable
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
    """FlexAttention with a block mask that is made once for each length; a break in a compiled graph.

    `lengths_B` says nothing to causal rows.
    """
    mask = _mask(q_BSNH.shape[1], causal, window, q_BSNH.device)
    heads_first = (x.transpose(1, 2) for x in (q_BSNH, k_BSKH, v_BSKH))
    grouped = q_BSNH.shape[2] != k_BSKH.shape[2]
    # One graph for each shape; past the usual limit it would hold all scores, with a warning only.
    with torch._dynamo.config.patch(recompile_limit=256):
        out: Tensor = _compiled()(*heads_first, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
