"""The transformer block, pre-norm. Shapes: B batch, S sequence, D hidden, N query heads, K key/value heads, H head dim.

N, K and F are this tensor-parallel rank's share inside the sublayers; x_BSD is whole on every rank.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.derived import ffn_size, head_dim, kv_heads
from engine.config.enums import Activation
from engine.config.schema import ModelConfig
from engine.dist.context import AxisGroup
from engine.dist.rng import ShardedRng
from engine.model.norm import make_norm
from engine.model.rope import RotaryTable
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine_kernels.ops import AttentionFn


def residual_std(cfg: ModelConfig) -> float:
    """Initial standard deviation of projections into the residual stream (GPT-2 report, section 2.3)."""
    return cfg.init_std / math.sqrt(2 * cfg.num_layers)


class Attention(nn.Module):
    """Causal self-attention, multi-head or grouped-query (arXiv 2305.13245); heads are cut over the tp axis."""

    def __init__(
        self,
        cfg: ModelConfig,
        tp: AxisGroup,
        attention: AttentionFn,
        rotary: RotaryTable | None,
        rng: ShardedRng | None,
    ) -> None:
        super().__init__()
        self.head_dim, self.dropout = head_dim(cfg), cfg.attention_dropout
        self.query_size = cfg.num_heads * self.head_dim // tp.size
        self.kv_size = kv_heads(cfg) * self.head_dim // tp.size
        self.attention, self.rotary, self.rng = attention, rotary, rng
        query, kv = cfg.num_heads * self.head_dim, kv_heads(cfg) * self.head_dim
        self.qkv = ColumnParallelLinear(
            cfg.hidden_size,
            query + 2 * kv,
            tp=tp,
            bias=cfg.bias,
            init_std=cfg.init_std,
            segments=(query, kv, kv),
        )
        self.out = RowParallelLinear(query, cfg.hidden_size, tp=tp, bias=cfg.bias, init_std=residual_std(cfg))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        parts = self.qkv(x_BSD).split((self.query_size, self.kv_size, self.kv_size), dim=-1)
        q_BSNH, k_BSKH, v_BSKH = (p.unflatten(-1, (-1, self.head_dim)) for p in parts)
        if self.rotary is not None:
            q_BSNH, k_BSKH = self.rotary.rotate(q_BSNH), self.rotary.rotate(k_BSKH)
        if self.rng is not None and self.training:
            with self.rng.fork(x_BSD.device):
                o_BSNH = self.attention(q_BSNH, k_BSKH, v_BSKH, causal=True, dropout=self.dropout)
        else:
            o_BSNH = self.attention(q_BSNH, k_BSKH, v_BSKH, causal=True)
        return self.out(o_BSNH.flatten(-2))


class MLP(nn.Module):
    """Feed-forward: GELU (GPT-2, its tanh form) or SwiGLU with gate and up fused (arXiv 2002.05202)."""

    def __init__(self, cfg: ModelConfig, tp: AxisGroup) -> None:
        super().__init__()
        size = ffn_size(cfg)
        self.activation = cfg.activation
        fused = (size, size) if cfg.activation is Activation.swiglu else (size,)
        self.up = ColumnParallelLinear(
            cfg.hidden_size, sum(fused), tp=tp, bias=cfg.bias, init_std=cfg.init_std, segments=fused
        )
        self.down = RowParallelLinear(size, cfg.hidden_size, tp=tp, bias=cfg.bias, init_std=residual_std(cfg))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        h_BSF = self.up(x_BSD)
        if self.activation is Activation.swiglu:
            gate, up = h_BSF.chunk(2, dim=-1)
            h_BSF = F.silu(gate) * up
        else:
            h_BSF = F.gelu(h_BSF, approximate="tanh" if self.activation is Activation.gelu_tanh else "none")
        return self.down(h_BSF)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both sublayers' outputs."""

    def __init__(
        self,
        cfg: ModelConfig,
        tp: AxisGroup,
        attention: AttentionFn,
        rotary: RotaryTable | None,
        rng: ShardedRng | None,
    ) -> None:
        super().__init__()
        self.dropout = cfg.dropout
        self.attention_norm = make_norm(cfg)
        self.attention = Attention(cfg, tp, attention, rotary, rng)
        self.mlp_norm = make_norm(cfg)
        self.mlp = MLP(cfg, tp)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_BSD = x_BSD + F.dropout(self.attention(self.attention_norm(x_BSD)), self.dropout, self.training)
        return x_BSD + F.dropout(self.mlp(self.mlp_norm(x_BSD)), self.dropout, self.training)
