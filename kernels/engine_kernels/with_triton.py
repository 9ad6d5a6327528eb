"""The implementations in Triton and where they can run. Imports Triton."""

from __future__ import annotations

import torch

from engine_kernels.interpreter import interpreted
from engine_kernels.kernels import Activations, Norms
from engine_kernels.registry import Impl, Situation
from engine_kernels.triton import attention, norm
from engine_kernels.triton.activation import gelu, swiglu
from engine_kernels.triton.adamw import adamw_step
from engine_kernels.triton.layer_norm import add_layer_norm, layer_norm
from engine_kernels.triton.linear_cross_entropy import linear_cross_entropy
from engine_kernels.triton.rms_norm import add_rms_norm, rms_norm
from engine_kernels.triton.rotary import rotate_qk


def _supports(s: Situation) -> str | None:
    if s.device.type != "cuda" and not interpreted():
        return "needs a CUDA device, or TRITON_INTERPRET=1"
    if s.device.type == "cuda" and torch.cuda.get_device_capability(s.device)[0] < 8:
        return "needs compute capability 8.0"
    return "takes bf16, fp16 and fp32, not torch.float64" if s.dtype is torch.float64 else None


def _attention_supports(s: Situation) -> str | None:
    if (reason := _supports(s)) is not None:
        return reason
    return None if s.head_dim <= attention.WIDEST else f"takes head dims up to {attention.WIDEST}, not {s.head_dim}"


def _loss_supports(s: Situation) -> str | None:
    if s.gathered:
        return "reads weights of several layers in the loss, as bert's do, and ZeRO-3 lends it those of one"
    return _supports(s)


def _norm_supports(s: Situation) -> str | None:
    if (reason := _supports(s)) is not None:
        return reason
    return None if s.width <= norm.WIDEST else f"takes hidden sizes up to {norm.WIDEST}, not {s.width}"


def _adamw_supports(s: Situation) -> str | None:
    return _supports(s) if s.update == "adamw" else f"steps by adamw, not by {s.update}"


def _interpreted(s: Situation) -> str | None:
    return None if s.device.type == "cuda" else "Triton's interpreter is for tests"


def _fusible(s: Situation) -> str | None:
    return "torch.compile fuses torch's with what stands around it" if s.compiled else _interpreted(s)


def _fused_less_well(s: Situation) -> str | None:
    """In bf16 training steps these are faster than what torch.compile makes; next to fp8 that is not measured."""
    if s.device.type == "cuda" and s.dtype is torch.bfloat16 and not s.fp8:
        return None
    return _fusible(s)


def _unmeasured(s: Situation) -> str | None:
    if s.device.type == "cuda" and s.dtype is not torch.bfloat16:
        return "is taken when asked for: whole training steps are measured in bf16 alone"
    return _interpreted(s)


def _scattered(s: Situation) -> str | None:
    if not s.flat:
        return "is launched for each parameter alone, where torch steps many at once"
    return _unmeasured(s)


# Without a residual a norm returns one tensor.
_NORMS = Norms(rms_norm, layer_norm, add_rms_norm, add_layer_norm)  # type: ignore[arg-type]
IMPLS = {
    impl.op: impl
    for impl in (
        Impl("attention", "triton", _attention_supports, attention.attention, _interpreted),
        Impl("linear_cross_entropy", "triton", _loss_supports, linear_cross_entropy, _unmeasured),
        Impl("norm", "triton", _norm_supports, _NORMS, _fused_less_well),
        Impl("rotary", "triton", _supports, rotate_qk, _fusible),
        Impl("activation", "triton", _supports, Activations(swiglu, gelu), _fused_less_well),
        Impl("adamw", "triton", _adamw_supports, adamw_step, _scattered),
    )
}
"""By operation."""
