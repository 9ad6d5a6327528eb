"""GPT as a list of layers; GPT-2, Llama, GPT-NeoX and Qwen2 are settings of it.

Shapes: B batch, L positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from engine.config.derived import in_fp8, logit_scale, padded_vocab, rotary_dim
from engine.config.enums import Positions, Recompute
from engine.config.schema import Config, ModelConfig
from engine.dist.context import AxisGroup, ParallelContext
from engine.model.block import Block, Wiring, run_block
from engine.model.feed import Feed
from engine.model.layers import LayerDef
from engine.model.norm import make_norm
from engine.model.rope import RotaryTable
from engine.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from engine.parallel.fused_loss import Projection
from engine.parallel.logical import LogicalTensor, make_parameter
from engine.parallel.sequence import whole
from engine_kernels.ops import PLAIN_LINEAR, Kernels, dropout

Factory = Callable[[], nn.Module]

EMBEDDING_SITE = 0
"""Dropout site of the embeddings; block i has site i + 1."""


class LearnedPositions(nn.Module):
    """Adds a learned vector per position."""

    def __init__(self, cfg: ModelConfig, tp: AxisGroup, sequence: bool) -> None:
        super().__init__()
        self.tp, self.sequence = tp, sequence
        shape = (cfg.max_positions, cfg.hidden_size)
        self.weight = make_parameter(shape, LogicalTensor(shape, init_std=cfg.init_std, role="embedding"))

    def forward(self, x_BLD: Tensor, positions: Tensor) -> Tensor:
        """(B, L, D) at `positions`, int64 (L,) or (B, L), -> (B, L, D)."""
        table = whole(self.weight, self.tp, sequence=self.sequence)
        if positions.dim() == 1:
            return x_BLD + table[positions]
        # Each document of a row adds to the gradients of the first positions: in bf16 such a sum ends at 256 terms.
        return x_BLD + table.to(torch.promote_types(table.dtype, torch.float32))[positions].to(table.dtype)


def drop_embeddings(cfg: ModelConfig, module: nn.Module, x_BLD: Tensor, feed: Feed) -> Tensor:
    """Dropout of the sum of all embeddings."""
    if cfg.dropout == 0 or not module.training:
        return x_BLD
    return dropout(x_BLD, feed.keys_BL(EMBEDDING_SITE), cfg.dropout)


def embed_tokens(module: nn.Module, _: None, feed: Feed) -> Tensor:
    """`LayerDef.run` of a token table."""
    x_BLD: Tensor = module(feed.tokens_BS)
    return x_BLD


def _embed_and_drop(cfg: ModelConfig, module: nn.Module, x: None, feed: Feed) -> Tensor:
    return drop_embeddings(cfg, module, embed_tokens(module, x, feed), feed)


def _add_positions(cfg: ModelConfig, module: nn.Module, x_BLD: Tensor, feed: Feed) -> Tensor:
    return drop_embeddings(cfg, module, module(x_BLD, feed.embedded_positions), feed)


def _normalise(module: nn.Module, x_BLD: Tensor, _: Feed) -> Tensor:
    out: Tensor = module(x_BLD)
    return out


def project(module: nn.Module, x_BLD: Tensor, kernels: Kernels, scale: float) -> Tensor | Projection:
    """This rank's columns of the logits, or what a fused loss takes in their place."""
    if kernels.linear_cross_entropy is not None:
        assert isinstance(module, VocabParallelEmbedding)
        return module.projection(x_BLD, kernels.linear_cross_entropy, scale)
    logits: Tensor = module(x_BLD, project=True)
    return logits if scale == 1.0 else logits * scale


def _logits(cfg: ModelConfig, kernels: Kernels, module: nn.Module, x_BLD: Tensor, _: Feed) -> Tensor | Projection:
    return project(module, x_BLD, kernels, logit_scale(cfg))


def vocabulary(cfg: Config, ctx: ParallelContext) -> tuple[Factory, Factory, str | None]:
    """Factories of the token table and of the output projection, and the key that ties them, if they are one."""
    model = cfg.model
    table, head = (
        partial(
            kind,
            model.vocab_size,
            model.hidden_size,
            padded=padded_vocab(model, ctx.tp.size),
            tp=ctx.tp,
            init_std=model.init_std,
            sequence=uses_sequence(cfg, ctx),
        )
        for kind in (VocabParallelEmbedding, VocabParallelHead)
    )
    return (table, table, "tokens") if model.tied_head else (table, head, None)


def block_layers(cfg: Config, ctx: ParallelContext, kernels: Kernels) -> list[LayerDef]:
    """The transformer blocks."""
    model = cfg.model
    rotary = None
    if model.positions is Positions.rotary:
        rotary = RotaryTable(model.max_positions, rotary_dim(model), model.rotary_base, ctx.device)
    wiring = Wiring(
        tp=ctx.tp,
        cp=ctx.cp,
        sequence=uses_sequence(cfg, ctx),
        kernels=kernels,
        rotary=rotary,
        recompute_attention=cfg.train.recompute is Recompute.selective,
        tiles=cfg.train.tiles,
        tile_tokens=cfg.train.tile_tokens,
    )
    wide = replace(wiring, kernels=replace(kernels, linear=PLAIN_LINEAR))
    return [
        LayerDef(f"block.{i}", partial(Block, model, mine), partial(run_block, model, mine, i + 1), repeats=True)
        for i in range(model.num_layers)
        for mine in [wiring if in_fp8(cfg, i) else wide]
    ]


def uses_sequence(cfg: Config, ctx: ParallelContext) -> bool:
    """Whether the residual stream is cut over tp."""
    return cfg.parallel.sequence and ctx.tp.size > 1


def gpt_layers(cfg: Config, ctx: ParallelContext, kernels: Kernels) -> list[LayerDef]:
    """Token embedding, positions, pre-norm blocks, norm, output projection: logits (B, S, this rank's columns).

    With a fused loss the `Projection` that they would be made of.
    """
    model, tp, sequence = cfg.model, ctx.tp, uses_sequence(cfg, ctx)
    table, head, tied = vocabulary(cfg, ctx)
    learned = model.positions is Positions.learned
    # The sum of all embeddings is dropped: after learned positions, or at once when positions are rotary.
    layers = [LayerDef("embed.tokens", table, embed_tokens if learned else partial(_embed_and_drop, model), tied)]
    if learned:
        positions = partial(LearnedPositions, model, tp, sequence)
        layers.append(LayerDef("embed.positions", positions, partial(_add_positions, model)))
    layers += block_layers(cfg, ctx, kernels)
    layers.append(LayerDef("final_norm", partial(make_norm, model, tp, kernels, sequence=sequence), _normalise))
    lends = kernels.linear_cross_entropy is not None
    layers.append(LayerDef("head", head, partial(_logits, model, kernels), tied, lends=lends))
    return layers
