"""Public operations. Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine_kernels.reference.attention import attention as reference_attention
from engine_kernels.registry import Impl, Situation, register


class AttentionFn(Protocol):
    """(B,S,N,H), (B,S,K,H), (B,S,K,H) -> (B,S,N,H); see `engine_kernels.reference.attention`."""

    def __call__(
        self, q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, causal: bool, dropout: float = 0.0
    ) -> Tensor: ...


def sdpa_attention(q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, causal: bool, dropout: float = 0.0) -> Tensor:
    """torch's scaled_dot_product_attention with the backend that torch picks."""
    out = torch.nn.functional.scaled_dot_product_attention(
        q_BSNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        dropout_p=dropout,
        is_causal=causal,
        enable_gqa=q_BSNH.shape[2] != k_BSKH.shape[2],
    )
    return out.transpose(1, 2)


def cudnn_attention(q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, causal: bool, dropout: float = 0.0) -> Tensor:
    """torch's attention held to the cuDNN backend, which on Hopper is about twice as fast as its flash backend."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q_BSNH, k_BSKH, v_BSKH, causal=causal, dropout=dropout)


def _cudnn_supports(s: Situation) -> str | None:
    if s.device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(s.device)[0] < 9:
        return "slower than the flash backend before compute capability 9.0"
    if s.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {s.dtype}"
    if s.head_dim % 8 or s.head_dim > 128:
        return f"takes head dims that are multiples of 8 up to 128, not {s.head_dim}"
    return None


register(Impl("attention", "sdpa_cudnn", _cudnn_supports, cudnn_attention))
register(Impl("attention", "sdpa", lambda s: None, sdpa_attention))
register(Impl("attention", "reference", lambda s: None, reference_attention))
