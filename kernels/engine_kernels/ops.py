"""Public operations. Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine_kernels.documents import Documents
from engine_kernels.packed import packed_attention
from engine_kernels.reference.attention import AttentionDropout, key_mask
from engine_kernels.reference.attention import attention as reference_attention
from engine_kernels.reference.dropout import attention_keys, dropout, row_keys
from engine_kernels.registry import Impl, Situation, register
from engine_kernels.seeded import seeded

__all__ = [
    "AttentionDropout",
    "AttentionFn",
    "Documents",
    "attention_keys",
    "cudnn_attention",
    "dropout",
    "row_keys",
    "sdpa_attention",
]


class AttentionFn(Protocol):
    """(B,S,N,H), (B,S,K,H), (B,S,K,H) -> (B,S,N,H); see `engine_kernels.reference.attention`."""

    def __call__(
        self,
        q_BSNH: Tensor,
        k_BSKH: Tensor,
        v_BSKH: Tensor,
        *,
        causal: bool,
        scale: float | None = None,
        lengths_B: Tensor | None = None,
        dropout: AttentionDropout | None = None,
        documents: Documents | None = None,
    ) -> Tensor: ...


def _sdpa(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    scale: float | None,
    lengths_B: Tensor | None,
    documents: Documents | None,
    p: float,
) -> Tensor:
    if documents is not None:
        return packed_attention(q_BSNH, k_BSKH, v_BSKH, causal=causal, scale=scale, documents=documents, p=p)
    groups, mask_B11S = q_BSNH.shape[2] // k_BSKH.shape[2], None
    if lengths_B is not None and not causal:
        mask_B11S = key_mask(lengths_B, k_BSKH.shape[1])[:, None, None]
        if groups > 1:
            # The memory-efficient backend has no grouped heads, and math would hold all scores.
            k_BSKH, v_BSKH = (x.repeat_interleave(groups, dim=2) for x in (k_BSKH, v_BSKH))
    out = torch.nn.functional.scaled_dot_product_attention(
        q_BSNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask_B11S,
        dropout_p=p,
        is_causal=causal,
        scale=scale,
        enable_gqa=groups > 1 and mask_B11S is None,
    )
    return out.transpose(1, 2)


# The generator's state is no value that a compiled graph could hold.
@torch.compiler.disable
def _seeded_sdpa(seed: int, q_BSNH: Tensor, *others: Tensor, **options: Any) -> Tensor:
    with seeded(seed, q_BSNH.device):
        return _sdpa(q_BSNH, *others, **options)


def sdpa_attention(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    lengths_B: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention with the backend that torch picks.

    Causal attention needs no mask for padding at the end: a query before it sees nothing after itself. Otherwise the
    padding is a bool mask (B, 1, 1, S) over the keys, which torch's cuDNN, memory-efficient and math backends take
    unexpanded; its flash backend takes none. Dropped weights are drawn by the backend from `dropout.seed`, with a
    break in a compiled graph. Documents: see `engine_kernels.packed`.
    """
    options: dict[str, Any] = {"causal": causal, "scale": scale, "lengths_B": lengths_B, "documents": documents}
    if dropout is None or dropout.p == 0.0:
        return _sdpa(q_BSNH, k_BSKH, v_BSKH, p=0.0, **options)
    return _seeded_sdpa(dropout.seed, q_BSNH, k_BSKH, v_BSKH, p=dropout.p, **options)


def cudnn_attention(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    lengths_B: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    documents: None = None,
) -> Tensor:
    """torch's attention held to the cuDNN backend, which on Hopper is about twice as fast as its flash backend.

    It takes no documents.
    """
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q_BSNH, k_BSKH, v_BSKH, causal=causal, scale=scale, lengths_B=lengths_B, dropout=dropout)


def _cudnn_supports(s: Situation) -> str | None:
    if s.device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(s.device)[0] < 9:
        return "slower than the flash backend before compute capability 9.0"
    if s.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {s.dtype}"
    if s.head_dim % 8 or s.head_dim > 128:
        return f"takes head dims that are multiples of 8 up to 128, not {s.head_dim}"
    if s.documents:
        return "has no attention inside the documents of packed rows in torch"
    version = torch.backends.cudnn.version() or 0
    if s.dropout and 91100 < version < 91400:
        return f"drops no attention weights in cuDNN 9.11 to 9.13, and this is {version}"
    return None


register(Impl("attention", "sdpa_cudnn", _cudnn_supports, cudnn_attention))
register(Impl("attention", "sdpa", lambda s: None, sdpa_attention))
register(Impl("attention", "reference", lambda s: None, reference_attention))
