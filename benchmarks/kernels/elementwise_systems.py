"""Who computes the operations of the suite `elementwise`: Octant's kernels, torch, compiled torch, Liger.

Each function takes and gives what the eager one of the same name in `benchmarks.kernels.elementwise` does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contest import Unavailable

OCTANT, EAGER, COMPILED, LIGER = "octant triton", "torch", "torch.compile", "liger"
EPS = 1e-5
Function = Callable[..., Any]


def systems(name: str, eager: Function, device: torch.device) -> dict[str, Callable[[], Function]]:
    """By name, what imports a system and gives its function."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return {
        OCTANT: _OCTANT[name],
        EAGER: lambda: eager,
        COMPILED: lambda: torch.compile(eager, backend=backend, dynamic=False),
        LIGER: _LIGER.get(name, _no_such_operation),
    }


def _no_such_operation() -> Function:
    raise Unavailable("has no such operation")


def _octant_rms_norm() -> Function:
    from engine_kernels.triton.rms_norm import rms_norm

    return partial(rms_norm, eps=EPS)


def _octant_rms_norm_residual() -> Function:
    from engine_kernels.triton.rms_norm import rms_norm

    return lambda x, residual, weight_D: rms_norm(x, weight_D, eps=EPS, residual=residual)


def _octant_layer_norm() -> Function:
    from engine_kernels.triton.layer_norm import layer_norm

    return partial(layer_norm, eps=EPS)


def _octant_rotate_qk() -> Function:
    from engine_kernels.triton.rotary import rotate_qk

    return rotate_qk


def _octant_swiglu() -> Function:
    from engine_kernels.triton.activation import swiglu

    return swiglu


def _octant_gelu_bias() -> Function:
    from engine_kernels.triton.activation import gelu

    return partial(gelu, approximate="tanh")


def _liger_rms_norm() -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # By default it would overwrite the output's gradient, which is used again here.
    return lambda x, weight_D: LigerRMSNormFunction.apply(x, weight_D, EPS, 0.0, "llama", False)


def _liger_rms_norm_residual() -> Function:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight_D: LigerFusedAddRMSNormFunction.apply(
        x, residual, weight_D, EPS, 0.0, "llama", False
    )


def _liger_layer_norm() -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight_D, bias_D: LigerLayerNormFunction.apply(x, weight_D, bias_D, EPS)


def _liger_rotate_qk() -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    def call(q: Tensor, k: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> tuple[Tensor, Tensor]:
        # It takes heads before positions and angles as wide as the head, and works on its inputs in place.
        wide = (torch.cat([x_SR, x_SR], dim=-1)[None] for x_SR in (cos_SR, sin_SR))
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *wide)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def _liger_swiglu() -> Function:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply


_OCTANT: dict[str, Callable[[], Function]] = {
    "rms_norm": _octant_rms_norm,
    "rms_norm residual": _octant_rms_norm_residual,
    "layer_norm": _octant_layer_norm,
    "rotate_qk": _octant_rotate_qk,
    "swiglu": _octant_swiglu,
    "gelu_bias": _octant_gelu_bias,
}
_LIGER: dict[str, Callable[[], Function]] = {
    "rms_norm": _liger_rms_norm,
    "rms_norm residual": _liger_rms_norm_residual,
    "layer_norm": _liger_layer_norm,
    "rotate_qk": _liger_rotate_qk,
    "swiglu": _liger_swiglu,
}
