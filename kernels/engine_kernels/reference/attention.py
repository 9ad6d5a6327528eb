"""Scaled dot-product attention written out: softmax(scale q k^T) v (arXiv 1706.03762, eq. 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine_kernels.documents import Documents
from engine_kernels.reference.dropout import dropout as drop


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionDropout:
    """How attention weights are dropped: by a mask written out, or by a fused kernel's own generator."""

    p: float
    """Probability of dropping a weight, in [0, 1)."""
    seed: int
    """Of the fused kernels' generator; another for every call of a step, and for ranks that hold other heads."""
    keys: Callable[[], Tensor]
    """int32 (B, N, S), see `attention_keys`: the mask of `reference`, whose channels are the key positions."""


def key_mask(lengths_B: Tensor, length: int) -> Tensor:
    """bool (B, `length`): the positions before the padding. An empty row keeps its first, so that nothing is 0 / 0."""
    return torch.arange(length, device=lengths_B.device) < lengths_B.clamp(min=1)[:, None]


def require_window(window: int | None) -> None:
    """Raise ValueError for a window that does not hold the query itself."""
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: a query sees at least itself, so it is 1 or more")


def band(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """bool (`length`, `length`): keys less than `window` positions away, for `causal` not after the query."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.triu(1 - window).tril(0 if causal else window - 1)


def attention(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    lengths_B: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    documents: Documents | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention with grouped key and value heads; scores and softmax in fp32 (fp64 for fp64 inputs).

    Args:
        q_BSNH: queries, (B, S, N, H).
        k_BSKH, v_BSKH: keys and values, (B, S, K, H); K divides N.
        causal: a position sees itself and what comes before.
        scale: factor of the scores. None: 1 / sqrt(H).
        lengths_B: positions of each row before its padding, integers; None: no padding. Keys of the padding get no
            weight from a query before it. Outputs of padded queries are finite and mean nothing.
        dropout: how weights are dropped; None: not at all. Its mask is the same in every layout.
        documents: a position sees its own document only; None: its row. Padding is a document, so that `lengths_B`
            says nothing more.
        window: a position sees keys less than this many positions away, itself among them (arXiv 2004.05150); None:
            all.

    Returns:
        (B, S, N, H) in the dtype of `q_BSNH`.
    """
    groups = q_BSNH.shape[2] // k_BSKH.shape[2]
    working = torch.promote_types(q_BSNH.dtype, torch.float32)
    q, k, v = (t.transpose(1, 2).to(working) for t in (q_BSNH, k_BSKH, v_BSKH))
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores_BNST = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    length = scores_BNST.shape[-1]
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores_BNST = scores_BNST.masked_fill(future, float("-inf"))
    if window is not None:
        scores_BNST = scores_BNST.masked_fill(~band(length, window, causal, q.device), float("-inf"))
    if documents is not None:
        number_BS = documents.numbers(q_BSNH.shape[0], length)
        other_BST = number_BS[:, :, None] != number_BS[:, None]
        scores_BNST = scores_BNST.masked_fill(other_BST[:, None], float("-inf"))
    elif lengths_B is not None:
        seen_BST = key_mask(lengths_B, length)[:, None]
        if window is not None:
            # Padding beyond the window of all keys sees itself: a softmax over nothing is no number.
            seen_BST = seen_BST | torch.eye(length, dtype=torch.bool, device=q.device)
        scores_BNST = scores_BNST.masked_fill(~seen_BST[:, None], float("-inf"))
    weights_BNST = scores_BNST.softmax(dim=-1)
    if dropout is not None:
        weights_BNST = drop(weights_BNST, dropout.keys(), dropout.p)
    return (weights_BNST @ v).transpose(1, 2).to(q_BSNH.dtype)
