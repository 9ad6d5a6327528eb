"""Scaled dot-product attention written out: softmax(q k^T / sqrt(H)) v (arXiv 1706.03762, eq. 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, causal: bool, dropout: float = 0.0) -> Tensor:
    """Attention with grouped key and value heads; scores and softmax in fp32 (fp64 for fp64 inputs).

    Args:
        q_BSNH: queries, (B, S, N, H).
        k_BSKH, v_BSKH: keys and values, (B, S, K, H); K divides N.
        causal: a position sees itself and what comes before.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, S, N, H) in the dtype of `q_BSNH`.
    """
    groups = q_BSNH.shape[2] // k_BSKH.shape[2]
    working = torch.promote_types(q_BSNH.dtype, torch.float32)
    q, k, v = (t.transpose(1, 2).to(working) for t in (q_BSNH, k_BSKH, v_BSKH))
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores_BNST = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        length = scores_BNST.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores_BNST = scores_BNST.masked_fill(future, float("-inf"))
    weights = torch.nn.functional.dropout(scores_BNST.softmax(dim=-1), p=dropout)
    return (weights @ v).transpose(1, 2).to(q_BSNH.dtype)
