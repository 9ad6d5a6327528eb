"""Normalisation over the last dimension, computed in fp32 whatever the input's dtype.

`add` is for a residual stream: s = x + residual and the norm of s, which kernels compute together, as they do the
gradients; without a residual s is x, to be read on in its place.
"""

from __future__ import annotations

from torch import Tensor, nn

from engine.config.enums import Norm
from engine.config.schema import ModelConfig
from engine.dist.context import AxisGroup
from engine.parallel.logical import replicated_parameter
from engine.parallel.sequence import whole
from engine_kernels.ops import Kernels


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (arXiv 1607.06450)."""

    def __init__(self, size: int, kernels: Kernels, *, eps: float, bias: bool, tp: AxisGroup, sequence: bool) -> None:
        super().__init__()
        self.eps, self.tp, self.sequence = eps, tp, sequence
        self.function, self.adding = kernels.layer_norm, kernels.add_layer_norm
        self.weight = replicated_parameter((size,), init_value=1.0)
        self.bias = replicated_parameter((size,), init_value=0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.function(x, *self._vectors(), eps=self.eps)

    def add(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of s = x + residual, and s; all (..., D)."""
        return self.adding(x, residual, *self._vectors(), eps=self.eps)

    def _vectors(self) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else whole(self.bias, self.tp, sequence=self.sequence)
        return whole(self.weight, self.tp, sequence=self.sequence), bias


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, size: int, kernels: Kernels, *, eps: float, tp: AxisGroup, sequence: bool) -> None:
        super().__init__()
        self.eps, self.tp, self.sequence = eps, tp, sequence
        self.function, self.adding = kernels.rms_norm, kernels.add_rms_norm
        self.weight = replicated_parameter((size,), init_value=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.function(x, whole(self.weight, self.tp, sequence=self.sequence), eps=self.eps)

    def add(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of s = x + residual, and s; all (..., D)."""
        return self.adding(x, residual, whole(self.weight, self.tp, sequence=self.sequence), eps=self.eps)


def make_norm(cfg: ModelConfig, tp: AxisGroup, kernels: Kernels, *, sequence: bool) -> LayerNorm | RMSNorm:
    """The normalisation of `cfg` over the residual stream."""
    if cfg.norm is Norm.rmsnorm:
        return RMSNorm(cfg.hidden_size, kernels, eps=cfg.norm_eps, tp=tp, sequence=sequence)
    return LayerNorm(cfg.hidden_size, kernels, eps=cfg.norm_eps, bias=cfg.bias, tp=tp, sequence=sequence)
