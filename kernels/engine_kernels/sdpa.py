"""torch's own attention: scaled_dot_product_attention with the backend that is asked for, or that torch picks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine_kernels.documents import Documents
from engine_kernels.packed import packed_attention, varlen_refuses
from engine_kernels.reference.attention import AttentionDropout, band, key_mask
from engine_kernels.registry import Situation
from engine_kernels.seeded import seeded

WIDE_TYPES = (torch.bfloat16, torch.float16)


def _sdpa(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    scale: float | None,
    lengths_B: Tensor | None,
    documents: Documents | None,
    window: int | None,
    p: float,
) -> Tensor:
    if documents is not None:
        return packed_attention(
            q_BSNH, k_BSKH, v_BSKH, causal=causal, scale=scale, documents=documents, window=window, p=p
        )
    groups, mask_B11S = q_BSNH.shape[2] // k_BSKH.shape[2], None
    if lengths_B is not None and not causal:
        mask_B11S = key_mask(lengths_B, k_BSKH.shape[1])[:, None, None]
    if window is not None:
        band_SS = band(k_BSKH.shape[1], window, causal, q_BSNH.device)
        # Padding beyond the window of all keys sees itself: a softmax over nothing is no number.
        itself_SS = torch.eye(len(band_SS), dtype=torch.bool, device=band_SS.device)
        mask_B11S = band_SS if mask_B11S is None else (mask_B11S | itself_SS) & band_SS
    if groups > 1 and mask_B11S is not None:
        # The memory-efficient backend has no grouped heads, and math would hold all scores.
        k_BSKH, v_BSKH = (x.repeat_interleave(groups, dim=2) for x in (k_BSKH, v_BSKH))
    out = torch.nn.functional.scaled_dot_product_attention(
        q_BSNH.transpose(1, 2),
        k_BSKH.transpose(1, 2),
        v_BSKH.transpose(1, 2),
        attn_mask=mask_B11S,
        dropout_p=p,
        is_causal=causal and mask_B11S is None,
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
    window: int | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention with the backend that torch picks.

    Causal attention needs no mask for padding at the end: a query before it sees nothing after itself. Otherwise the
    padding is a bool mask (B, 1, 1, S) over the keys, which torch's cuDNN, memory-efficient and math backends take
    unexpanded; its flash backend takes none. A window is a bool mask (S, S). Dropped weights are drawn by the backend
    from `dropout.seed`, with a break in a compiled graph. Documents: see `engine_kernels.packed`.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "scale": scale,
        "lengths_B": lengths_B,
        "documents": documents,
        "window": window,
    }
    if dropout is None or dropout.p == 0.0:
        return _sdpa(q_BSNH, k_BSKH, v_BSKH, p=0.0, **options)
    return _seeded_sdpa(dropout.seed, q_BSNH, k_BSKH, v_BSKH, p=dropout.p, **options)


def _held(backend: SDPBackend, q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa_attention(q_BSNH, k_BSKH, v_BSKH, **options)


cudnn_attention = partial(_held, SDPBackend.CUDNN_ATTENTION)
"""`sdpa_attention` held to the cuDNN backend, which on Hopper is about twice as fast as torch's flash backend."""
flash_attention = partial(_held, SDPBackend.FLASH_ATTENTION)
"""`sdpa_attention` held to torch's flash backend (FlashAttention 2); documents by its variable-length kernel."""


def on_gpu(s: Situation) -> str | None:
    """Why a kernel for 16-bit tensors on CUDA devices cannot run."""
    if s.device.type != "cuda":
        return "needs a CUDA device"
    if s.dtype not in WIDE_TYPES:
        return f"takes bf16 and fp16, not {s.dtype}"
    return None


def cudnn_supports(s: Situation) -> str | None:
    """Why torch's cuDNN backend cannot run."""
    if (reason := on_gpu(s)) is not None:
        return reason
    if torch.cuda.get_device_capability(s.device)[0] < 9:
        return "slower than the flash backend before compute capability 9.0"
    if s.head_dim % 8 or s.head_dim > 128:
        return f"takes head dims that are multiples of 8 up to 128, not {s.head_dim}"
    if s.documents:
        return "has no attention inside the documents of packed rows in torch"
    if s.window:
        return "slides no window in torch"
    if s.deterministic:
        return "adds up gradients in no fixed order"
    version = torch.backends.cudnn.version() or 0
    if s.dropout and 91100 < version < 91400:
        return f"drops no attention weights in cuDNN 9.11 to 9.13, and this is {version}"
    return None


def flash_supports(s: Situation) -> str | None:
    """Why torch's flash backend cannot run."""
    if (reason := on_gpu(s)) is not None:
        return reason
    if torch.cuda.get_device_capability(s.device)[0] < 8:
        return "needs compute capability 8.0"
    if s.head_dim % 8 or s.head_dim > 256:
        return f"takes head dims that are multiples of 8 up to 256, not {s.head_dim}"
    if s.head_dim > 192 and torch.cuda.get_device_capability(s.device) not in ((8, 0), (9, 0), (10, 0)):
        return f"takes head dims up to 192 on this GPU, not {s.head_dim}"
    if s.padded and not s.causal and not s.documents:
        return "takes no mask for padding"
    if s.window and not s.documents:
        return "slides no window in torch"
    if s.deterministic:
        return "adds up gradients in no fixed order"
    if s.documents and (s.dropout or (refusal := varlen_refuses(s.device, s.dtype, s.head_dim)) is not None):
        return "drops no weights inside documents" if s.dropout else refusal
    return None


def sdpa_hesitates(s: Situation) -> str | None:
    """Why `auto` leaves it to others on a GPU."""
    if s.device.type == "cuda" and s.window and not s.documents:
        return "holds a mask of all pairs of positions for a window"
    if s.device.type == "cuda" and s.documents and s.dropout:
        return "has a call for every length of a document where weights are dropped"
    return None


def sdpa_supports(s: Situation) -> str | None:
    """Why torch's pick among its backends cannot run: only where two runs must give the same bits on a GPU."""
    return "adds up gradients in no fixed order" if s.deterministic and s.device.type == "cuda" else None
