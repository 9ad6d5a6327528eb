"""Public operations. Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from engine_kernels import flash, flex, plain, scaled_mm, sdpa
from engine_kernels.documents import Documents
from engine_kernels.kernels import (
    PLAIN_LINEAR,
    AccumulateFn,
    Activations,
    AdamWFn,
    AttentionFn,
    Kernels,
    Linear,
    LinearCrossEntropyFn,
    Norms,
    kernels_of,
)
from engine_kernels.reference import fp8_linear
from engine_kernels.reference.attention import AttentionDropout, require_window
from engine_kernels.reference.attention import attention as reference_attention
from engine_kernels.reference.dropout import attention_keys, dropout, row_keys
from engine_kernels.reference.rotary import rotate_qk
from engine_kernels.registry import Choice, Impl, Situation, choose, register
from engine_kernels.sdpa import cudnn_attention, sdpa_attention

__all__ = [
    "PLAIN_LINEAR",
    "AccumulateFn",
    "AdamWFn",
    "AttentionDropout",
    "AttentionFn",
    "Documents",
    "Kernels",
    "Linear",
    "LinearCrossEntropyFn",
    "accumulation",
    "attention",
    "attention_keys",
    "cudnn_attention",
    "dropout",
    "kernels_of",
    "row_keys",
    "sdpa_attention",
]


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
    deterministic: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Attention by the implementation that is fastest here, or by the one called `implementation`.

    A model asks `registry.choose` once instead, and calls what it was given.

    Args:
        q_BSNH: queries, (B, S, N, H), bf16, fp16, fp32 or fp64; any strides.
        k_BSKH, v_BSKH: keys and values, (B, S, K, H); K divides N.
        causal: a position sees itself and what comes before.
        scale: factor of the scores. None: 1 / sqrt(H).
        lengths_B: positions of each row before its padding, integers; outputs of padded queries mean nothing.
        dropout: how weights are dropped; None: not at all.
        documents: a position sees its own document only; None: its row. `lengths_B` then says nothing more.
        window: a position sees keys less than this many positions away, itself among them; None: all.
        deterministic: the same inputs give the same bits, in the backward pass too.

    Raises:
        KernelUnavailable: `implementation` cannot run this, with the reason.
        ValueError: `window` is less than 1.
    """
    require_window(window)
    situation = Situation(
        q_BSNH.device,
        q_BSNH.dtype,
        head_dim=q_BSNH.shape[-1],
        length=q_BSNH.shape[1],
        groups=q_BSNH.shape[2] // max(k_BSKH.shape[2], 1),
        causal=causal,
        dropout=dropout is not None and dropout.p > 0,
        documents=documents is not None,
        padded=lengths_B is not None,
        window=window is not None,
        deterministic=deterministic,
    )
    out: Tensor = _chosen(implementation, situation).impl.fn(
        q_BSNH,
        k_BSKH,
        v_BSKH,
        causal=causal,
        scale=scale,
        lengths_B=lengths_B,
        dropout=dropout,
        documents=documents,
        window=window,
    )
    return out


def accumulation(device: torch.device) -> AccumulateFn:
    """How gradients are added to sums on `device`; whoever does it, the bits are the same."""
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if not modern or find_spec("triton") is None:
        return plain.accumulate
    from engine_kernels.triton.accumulate import accumulate

    return accumulate


# Looks for packages and files, which no compiled graph can.
@torch.compiler.disable
@cache
def _chosen(name: str, situation: Situation) -> Choice:
    return choose("attention", name, situation)


def _always(s: Situation) -> str | None:
    return None


def _triton(op: str) -> Impl:
    if find_spec("triton") is None:
        return Impl(op, "triton", lambda s: "Triton is not installed", None)
    from engine_kernels.with_triton import IMPLS

    return IMPLS[op]


register(Impl("attention", "flash_attn_4", flash.four_supports, flash.four_attention))
register(Impl("attention", "sdpa_cudnn", sdpa.cudnn_supports, cudnn_attention))
register(Impl("attention", "flash_attn", flash.two_supports, flash.two_attention))
register(Impl("attention", "sdpa", sdpa.sdpa_supports, sdpa_attention, sdpa.sdpa_hesitates))
register(_triton("attention"))
register(Impl("attention", "sdpa_flash", sdpa.flash_supports, sdpa.flash_attention))
register(Impl("attention", "flex", flex.flex_supports, flex.flex_attention_of))
register(Impl("attention", "reference", _always, reference_attention))
for _op, _plain in (
    ("linear_cross_entropy", None),
    ("norm", Norms(plain.rms_norm, plain.layer_norm, plain.add_rms_norm, plain.add_layer_norm)),
    ("rotary", rotate_qk),
    ("activation", Activations(plain.swiglu, plain.gelu)),
    ("adamw", None),
):
    # Triton's first: where torch's is as good, it is reluctant.
    register(_triton(_op))
    register(Impl(_op, "torch", _always, _plain))
register(Impl("fp8_linear", "scaled_mm", scaled_mm.supports, scaled_mm.linear))
register(Impl("fp8_linear", "emulated", _always, fp8_linear.emulated))
