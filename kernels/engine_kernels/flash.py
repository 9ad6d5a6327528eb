"""flash-attn 2 and flash-attn-4, where they are installed: https://github.com/Dao-AILab/flash-attention."""

from __future__ import annotations

import importlib
import inspect
from contextlib import nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from engine_kernels.attention_autograd import Gradients, differentiate_by, gradients_like
from engine_kernels.documents import Documents, piece_starts
from engine_kernels.reference.attention import AttentionDropout
from engine_kernels.registry import Situation
from engine_kernels.sdpa import on_gpu
from engine_kernels.seeded import seeded


@cache
def _two() -> Any:
    """The module flash_attn, or the reason why there is none."""
    try:
        module = importlib.import_module("flash_attn")
    except Exception as error:  # a build for another torch fails in many ways
        return f"cannot be imported ({error!s:.80})"
    return module if hasattr(module, "flash_attn_func") else "is not flash-attn 2: it has no flash_attn_func"


@cache
def _four() -> Any:
    """The module flash_attn.cute.interface, or the reason why there is none."""
    try:
        module = importlib.import_module("flash_attn.cute.interface")
    except Exception as error:
        return f"cannot be imported ({error!s:.80})"
    for name, wanted in (
        ("_flash_attn_fwd", {"cu_seqlens_q", "max_seqlen_q", "softmax_scale", "window_size_left", "return_lse"}),
        ("_flash_attn_bwd", {"cu_seqlens_q", "max_seqlen_q", "softmax_scale", "window_size_left", "dq", "dk", "dv"}),
    ):
        function = getattr(module, name, None)
        if function is None or not wanted <= set(inspect.signature(function).parameters):
            return f"of this version has no {name} with the options that are needed"
    return module


def two_supports(s: Situation) -> str | None:
    """Why flash-attn 2 cannot run."""
    if (reason := on_gpu(s)) is not None:
        return reason
    if isinstance(found := _two(), str):
        return found
    if torch.cuda.get_device_capability(s.device)[0] < 8:
        return "needs compute capability 8.0"
    return None if s.head_dim % 8 == 0 and s.head_dim <= 256 else f"takes multiples of 8 up to 256, not {s.head_dim}"


def four_supports(s: Situation) -> str | None:
    """Why flash-attn-4 cannot run."""
    if (reason := on_gpu(s)) is not None:
        return reason
    major = torch.cuda.get_device_capability(s.device)[0]
    if major not in (9, 10, 11):
        return "needs compute capability 9.0 to 11.0"
    if s.dropout or s.deterministic:
        return "drops no attention weights" if s.dropout else "adds up gradients in no fixed order"
    widest = 256 if major == 9 else 128
    if s.head_dim % 8 or s.head_dim > widest:
        return f"takes head dims that are multiples of 8 up to {widest}, not {s.head_dim}"
    return found if isinstance(found := _four(), str) else None


# Its autograd function is no graph that could be compiled, and the dropout's generator no value of one.
@torch.compiler.disable
def two_attention(
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
    """FlashAttention 2 (arXiv 2307.08691) in fixed order; a break in a compiled graph. Drops from `dropout.seed`."""
    reach = -1 if window is None else window - 1
    options: dict[str, Any] = {
        "dropout_p": 0.0 if dropout is None else dropout.p,
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (reach, 0 if causal else reach),
        "deterministic": True,
    }
    B, S, *_ = q_BSNH.shape
    with nullcontext() if dropout is None else seeded(dropout.seed, q_BSNH.device):
        if documents is None and (lengths_B is None or causal):
            return cast(Tensor, _two().flash_attn_func(q_BSNH, k_BSKH, v_BSKH, **options))
        starts, longest = _pieces(documents, lengths_B, S)
        flat = (x.flatten(0, 1) for x in (q_BSNH, k_BSKH, v_BSKH))
        out = _two().flash_attn_varlen_func(*flat, starts, starts, longest, longest, **options)
        return cast(Tensor, out.unflatten(0, (B, S)))


def _pieces(documents: Documents | None, lengths_B: Tensor | None, length: int) -> tuple[Tensor, int]:
    if documents is not None:
        return documents.starts, documents.longest
    assert lengths_B is not None
    return piece_starts(lengths_B, length), length


def four_attention(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    lengths_B: Tensor | None = None,
    dropout: None = None,
    documents: Documents | None = None,
    window: int | None = None,
) -> Tensor:
    """flash-attn-4, made for Hopper and Blackwell; works in compiled graphs. It has no dropout."""
    B, S, _, H = q_BSNH.shape
    scale = H**-0.5 if scale is None else scale
    if documents is None and (lengths_B is None or causal):
        out, _ = _forward(q_BSNH, k_BSKH, v_BSKH, None, S, scale, causal, window or 0)
        return out
    starts, longest = _pieces(documents, lengths_B, S)
    flat = (x.flatten(0, 1) for x in (q_BSNH, k_BSKH, v_BSKH))
    out, _ = _forward(*flat, starts, longest, scale, causal, window or 0)
    return out.unflatten(0, (B, S))


def _limits(starts: Tensor | None, longest: int, scale: float, causal: bool, window: int) -> dict[str, Any]:
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
    if window:
        options |= {"window_size_left": window - 1, "window_size_right": 0 if causal else window - 1}
    if starts is not None:
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), starts)
        options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), longest)
    return options


@torch.library.custom_op("octant::flash_attn_4", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    longest: int,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    limits = _limits(starts, longest, scale, causal, window)
    out, lse, *_ = _four()._flash_attn_fwd(*(_packed(x) for x in (q, k, v)), return_lse=True, **limits)
    return out, lse


def _packed(x: Tensor) -> Tensor:
    """With the last dim's elements side by side, as its kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


@_forward.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *rest, S, N, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((*rest, N, S), dtype=torch.float32)


@torch.library.custom_op("octant::flash_attn_4_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    longest: int,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    limits = _limits(starts, longest, scale, causal, window)
    packed = (_packed(x) for x in (q, k, v, out, do))
    dq, dk, dv = gradients_like(q, k, v)
    _four()._flash_attn_bwd(*packed, lse, dq=dq, dk=dk, dv=dv, **limits)
    return dq, dk, dv


@_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Gradients:
    return gradients_like(q, k, v)


differentiate_by(_forward, _backward, tensors=1)
