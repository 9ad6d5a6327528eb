"""The transformer block. Shapes: B batch, S sequence, D hidden, N query heads, K key/value heads, H head dim, F ffn.

N, K and F are this tensor-parallel rank's share inside the sublayers. L are the positions of this rank's residual
stream: with sequence parallelism a run of them, S/t, else all S; with context parallelism S is itself a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.config.derived import attention_scale, ffn_size, head_dim, kv_heads, matrix_init_scale, qkv_bias
from engine.config.enums import Activation, Family, Tiles
from engine.config.schema import ModelConfig
from engine.dist.context import AxisGroup
from engine.model.feed import Feed
from engine.model.norm import make_norm
from engine.model.rope import RotaryTable
from engine.model.tiled import Part, tiled
from engine.parallel.context import to_heads, to_positions
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine_kernels.ops import AttentionDropout, Documents, Kernels, dropout

_IN_TILES: dict[Tiles, tuple[str, ...]] = {Tiles.none: (), Tiles.mlp: ("_feed",), Tiles.block: ("_before", "_after")}
"""Methods that run tile by tile."""
_AFTER_MLP = 1
"""Salt that tells a block's second dropout of the residual stream from its first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What all blocks of a rank share: axes, kernels, rotary angles, recomputation."""

    tp: AxisGroup
    cp: AxisGroup
    sequence: bool
    kernels: Kernels
    rotary: RotaryTable | None
    recompute_attention: bool
    """Keep queries, keys and values only, and compute the attention core again in the backward pass."""
    tiles: Tiles = Tiles.none
    tile_tokens: int = 8192
    """Tokens of one tile; with sequence parallelism those of all tp ranks together."""


def matrix_std(cfg: ModelConfig) -> float:
    """Initial standard deviation of matrices between hidden layers."""
    return cfg.init_std * matrix_init_scale(cfg)


def residual_std(cfg: ModelConfig) -> float:
    """The same for projections into the residual stream (GPT-2 report, section 2.3; BERT makes no difference)."""
    return matrix_std(cfg) if cfg.family is Family.bert else matrix_std(cfg) / math.sqrt(2 * cfg.num_layers)


class Attention(nn.Module):
    """Self-attention, multi-head or grouped-query (arXiv 2305.13245); heads are cut over tp, and over cp inside."""

    def __init__(self, cfg: ModelConfig, wiring: Wiring) -> None:
        super().__init__()
        tp = wiring.tp
        self.wiring, self.head_dim, self.causal = wiring, head_dim(cfg), cfg.family is Family.gpt
        self.scale = attention_scale(cfg)
        query, kv = cfg.num_heads * self.head_dim, kv_heads(cfg) * self.head_dim
        self.query_size, self.kv_size = query // tp.size, kv // tp.size
        self.qkv = ColumnParallelLinear(
            cfg.hidden_size,
            query + 2 * kv,
            tp=tp,
            bias=qkv_bias(cfg),
            init_std=matrix_std(cfg),
            segments=(query, kv, kv),
            sequence=wiring.sequence,
            how=wiring.kernels.linear,
        )
        self.out = RowParallelLinear(
            query,
            cfg.hidden_size,
            tp=tp,
            bias=cfg.bias,
            init_std=residual_std(cfg),
            sequence=wiring.sequence,
            how=wiring.kernels.linear,
        )

    def project(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> queries (B, S, N * H), keys and values (B, S, K * H)."""
        query, key, value = self.qkv(x_BLD).split((self.query_size, self.kv_size, self.kv_size), dim=-1)
        return query, key, value

    def attend(
        self,
        parts: Sequence[Tensor],
        lengths_B: Tensor | None,
        drop: AttentionDropout | None,
        documents: Documents | None,
        positions_BS: Tensor | None,
    ) -> Tensor:
        """What `project` gives -> (B, S, N * H), for `out`; the other arguments as `Block.forward` has them."""
        q_BLNH, k_BLKH, v_BLKH = (p.unflatten(-1, (-1, self.head_dim)) for p in parts)
        q, k, v = to_heads(q_BLNH, k_BLKH, v_BLKH, self.wiring.cp)
        seen = (lengths_B, drop, documents, positions_BS)
        if self.wiring.recompute_attention and torch.is_grad_enabled():
            o = checkpoint(self._core, q, k, v, *seen, use_reentrant=False, preserve_rng_state=False)
        else:
            o = self._core(q, k, v, *seen)
        return to_positions(o, self.wiring.cp).flatten(-2)

    def _core(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths_B: Tensor | None,
        drop: AttentionDropout | None,
        documents: Documents | None,
        positions_BS: Tensor | None,
    ) -> Tensor:
        """Some heads of all positions of the sequence, (B, S, N, H) and twice (B, S, K, H) -> (B, S, N, H)."""
        rotary, kernels = self.wiring.rotary, self.wiring.kernels
        if rotary is not None:
            q, k = kernels.rotate_qk(q, k, rotary.cos_SR, rotary.sin_SR, positions_BS)
        return kernels.attention(
            q, k, v, causal=self.causal, scale=self.scale, lengths_B=lengths_B, dropout=drop, documents=documents
        )


class MLP(nn.Module):
    """Feed-forward: GELU (GPT-2, its tanh form) or SwiGLU with gate and up fused (arXiv 2002.05202)."""

    def __init__(self, cfg: ModelConfig, wiring: Wiring) -> None:
        super().__init__()
        size, tp, sequence = ffn_size(cfg), wiring.tp, wiring.sequence
        self.activation, self.kernels = cfg.activation, wiring.kernels
        fused = (size, size) if cfg.activation is Activation.swiglu else (size,)
        self.up = ColumnParallelLinear(
            cfg.hidden_size,
            sum(fused),
            tp=tp,
            bias=cfg.bias,
            init_std=matrix_std(cfg),
            segments=fused,
            sequence=sequence,
            ordered=False,
            how=wiring.kernels.linear,
        )
        self.down = RowParallelLinear(
            size,
            cfg.hidden_size,
            tp=tp,
            bias=cfg.bias,
            init_std=residual_std(cfg),
            sequence=sequence,
            ordered=False,
            how=wiring.kernels.linear,
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        h_GPF = self.up(x_BLD)
        if self.activation is Activation.swiglu:
            h_GPF = self.kernels.swiglu(h_GPF)
        else:
            h_GPF = self.kernels.gelu(h_GPF, approximate="tanh" if self.activation is Activation.gelu_tanh else "none")
        return self.down(h_GPF)


class Block(nn.Module):
    """Attention and feed-forward, each with dropout and a residual sum.

    `gpt` normalises each sublayer's input (pre-norm): x + f(norm(x)), or with `parallel_residual` both sublayers read
    the block's input: x + f1(norm1(x)) + f2(norm2(x)). `bert` normalises the sum (post-norm): norm(x + f(x)).
    """

    def __init__(self, cfg: ModelConfig, wiring: Wiring) -> None:
        super().__init__()
        self.p, self.post_norm, self.parallel = cfg.dropout, cfg.family is Family.bert, cfg.parallel_residual
        self.wiring = wiring
        self.attention_norm = make_norm(cfg, wiring.tp, wiring.kernels, sequence=wiring.sequence)
        self.attention = Attention(cfg, wiring)
        self.mlp_norm = make_norm(cfg, wiring.tp, wiring.kernels, sequence=wiring.sequence)
        self.mlp = MLP(cfg, wiring)

    def forward(
        self,
        x_BLD: Tensor,
        keys_BL: Tensor | None = None,
        lengths_B: Tensor | None = None,
        drop: AttentionDropout | None = None,
        documents: Documents | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D).

        Args:
            keys_BL: keys of the residual stream's dropout, int32; None: no dropout.
            lengths_B: positions of the whole sequence before its padding, None: no row is padded.
            drop: dropout of the attention weights.
            documents: of the whole sequences, to attend inside of; None: over all of a row.
            positions_BS: rotary positions of the whole sequences, int64; None: those in the row.
        """
        attention = self.attention
        before: list[nn.Module] = [attention.qkv]
        after = [attention.out, self.mlp, self.mlp_norm]
        (after if self.post_norm else before).append(self.attention_norm)
        if self.post_norm or self.wiring.tiles is Tiles.block:
            parts = self._run(Tiles.block, "_before", before, x_BLD)
        else:
            # Tiles would copy what is handed on.
            y_BLD, x_BLD = self.attention_norm.add(x_BLD)
            parts = attention.project(y_BLD)
        o_BSD = attention.attend(parts, lengths_B, drop, documents, positions_BS)
        (out_BLD,) = self._run(Tiles.block, "_after", after, x_BLD, o_BSD, keys_BL)
        return out_BLD

    def _before(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        """What comes before the attention core."""
        return self.attention.project(x_BLD if self.post_norm else self.attention_norm(x_BLD))

    def _after(self, x_BLD: Tensor, o_BSD: Tensor, keys_BL: Tensor | None) -> tuple[Tensor, ...]:
        """What comes after it, from the block's input and the core's output."""
        feed = [self.mlp, self.mlp_norm]
        attended_BLD = self._drop(self.attention.out(o_BSD), keys_BL, 0)
        if self.post_norm:
            y_BLD, _ = self.attention_norm.add(attended_BLD, x_BLD)
            return self._run(Tiles.mlp, "_feed", feed, y_BLD, keys_BL)
        if self.parallel or self.wiring.tiles is Tiles.mlp:
            s_BLD = x_BLD + attended_BLD
            (fed_BLD,) = self._run(Tiles.mlp, "_feed", feed, x_BLD if self.parallel else s_BLD, keys_BL)
            return (s_BLD + fed_BLD,)
        y_BLD, s_BLD = self.mlp_norm.add(attended_BLD, x_BLD)
        return (s_BLD + self._fed(y_BLD, keys_BL),)

    def _feed(self, x_BLD: Tensor, keys_BL: Tensor | None) -> tuple[Tensor, ...]:
        """The feed-forward with its norm; post-norm with its residual sum too."""
        if self.post_norm:
            return (self.mlp_norm.add(self._fed(x_BLD, keys_BL), x_BLD)[0],)
        return (self._fed(self.mlp_norm(x_BLD), keys_BL),)

    def _fed(self, y_BLD: Tensor, keys_BL: Tensor | None) -> Tensor:
        return self._drop(self.mlp(y_BLD), keys_BL, _AFTER_MLP)

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """As `nn.Module.compile`; what runs in tiles becomes graphs of its own."""
        super().compile(**options)
        self._compile_methods(*_IN_TILES[self.wiring.tiles], **options)

    def compile_forward(self, **options: Any) -> None:
        """As `compile`, with the block's hooks outside of the graphs."""
        self._compile_methods("forward", *_IN_TILES[self.wiring.tiles], **options)

    def _compile_methods(self, *names: str, **options: Any) -> None:
        for name in names:
            setattr(self, name, torch.compile(getattr(self, name), **options))

    def _drop(self, x_BLD: Tensor, keys_BL: Tensor | None, salt: int) -> Tensor:
        return x_BLD if keys_BL is None else dropout(x_BLD, keys_BL, self.p, salt)

    def _run(
        self, kind: Tiles, name: str, modules: Sequence[nn.Module], x_BLD: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The method `name` of the arguments with the weights of `modules`, in tiles if those of `kind` are wanted."""
        if self.wiring.tiles is not kind:
            part: Part = getattr(self, name)
            return part(x_BLD, *others)
        return self._in_tiles(name, modules, x_BLD, *others)

    # Loops over tiles and differentiates inside; what it calls may be compiled on its own, and is looked up here, as
    # torch 2.11 would hand it on from a graph uncompiled.
    @torch.compiler.disable
    def _in_tiles(
        self, name: str, modules: Sequence[nn.Module], x_BLD: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, ...]:
        wiring = self.wiring
        rows = x_BLD.shape[0] * (wiring.tp.size if wiring.sequence else 1)
        parameters = [p for module in modules for p in module.parameters()]
        found: tuple[Tensor, ...] = tiled(
            getattr(self, name), (x_BLD, *others), parameters, tile=max(1, wiring.tile_tokens // rows)
        )
        return found


def run_block(cfg: ModelConfig, wiring: Wiring, site: int, module: nn.Module, x_BLD: Tensor, feed: Feed) -> Tensor:
    """`LayerDef.run` of block number `site - 1`: dropout keys are made outside of what is compiled."""
    keys_BL = feed.keys_BL(site) if cfg.dropout > 0 and module.training else None
    drop = None
    if cfg.attention_dropout > 0 and module.training:
        heads = cfg.num_heads // wiring.tp.size // wiring.cp.size
        first_head = (wiring.tp.rank * wiring.cp.size + wiring.cp.rank) * heads
        drop = feed.attention_dropout(cfg.attention_dropout, site, first_head, heads)
    out: Tensor = module(x_BLD, keys_BL, feed.lengths_B, drop, feed.documents, feed.document_positions_BS)
    return out
