"""Normalisation over the last dimension, computed in fp32 whatever the input's dtype."""

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
        self.function = kernels.layer_norm
        self.weight = replicated_parameter((size,), init_value=1.0)
        self.bias = replicated_parameter((size,), init_value=0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        weight = whole(self.weight, self.tp, sequence=self.sequence)
        bias = None if self.bias is None else whole(self.bias, self.tp, sequence=self.sequence)
        return self.function(x, weight, bias, eps=self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, size: int, kernels: Kernels, *, eps: float, tp: AxisGroup, sequence: bool) -> None:
        super().__init__()
        self.eps, self.tp, self.sequence = eps, tp, sequence
        self.function = kernels.rms_norm
        self.weight = replicated_parameter((size,), init_value=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        weight = whole(self.weight, self.tp, sequence=self.sequence)
        return self.function(x, weight, eps=self.eps)


def make_norm(cfg: ModelConfig, tp: AxisGroup, kernels: Kernels, *, sequence: bool) -> nn.Module:
    """The normalisation of `cfg` over the residual stream."""
    if cfg.norm is Norm.rmsnorm:
        return RMSNorm(cfg.hidden_size, kernels, eps=cfg.norm_eps, tp=tp, sequence=sequence)
    return LayerNorm(cfg.hidden_size, kernels, eps=cfg.norm_eps, bias=cfg.bias, tp=tp, sequence=sequence)
