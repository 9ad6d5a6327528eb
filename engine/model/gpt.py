"""GPT as a list of layers. GPT-2 and Llama are two settings of it. Shapes: B batch, S sequence, D hidden."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.derived import head_dim, padded_vocab
from engine.config.enums import Positions
from engine.config.schema import ModelConfig
from engine.dist.context import ParallelContext
from engine.dist.rng import ShardedRng
from engine.model.block import Block
from engine.model.layers import LayerDef
from engine.model.norm import make_norm
from engine.model.rope import RotaryTable
from engine.parallel.cross_entropy import vocab_parallel_cross_entropy
from engine.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from engine.parallel.logical import LogicalTensor, make_parameter
from engine_kernels.ops import AttentionFn


class LearnedPositions(nn.Module):
    """Adds a learned vector per position, then drops."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        shape = (cfg.max_positions, cfg.hidden_size)
        self.weight = make_parameter(shape, LogicalTensor(shape, init_std=cfg.init_std))
        self.dropout = cfg.dropout

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return F.dropout(x_BSD + self.weight[: x_BSD.shape[1]], self.dropout, self.training)


def _tied_logits(table: nn.Module, x_BSD: Tensor) -> Tensor:
    logits: Tensor = table(x_BSD, project=True)
    return logits


def build_layers(cfg: ModelConfig, ctx: ParallelContext, attention: AttentionFn) -> list[LayerDef]:
    """The model as layers: token embedding, positions, blocks, final norm, output projection.

    Args:
        cfg: sizes and flavour; the rules of `engine.config.rules` hold for it.
        ctx: its tp axis cuts the layers, its device holds the rotary table.
        attention: the chosen implementation of the attention operation.

    Returns:
        Layers whose composition takes tokens (B, S) int64 to logits (B, S, this rank's columns of the padded
        vocabulary). Nothing is allocated but the rotary table.
    """
    tp = ctx.tp
    padded = padded_vocab(cfg, tp.size)
    # Learned positions drop after adding themselves; with rotary positions the embedding itself does.
    dropout = 0.0 if cfg.positions is Positions.learned else cfg.dropout
    table, head = (
        partial(kind, cfg.vocab_size, cfg.hidden_size, padded=padded, tp=tp, init_std=cfg.init_std, dropout=dropout)
        for kind in (VocabParallelEmbedding, VocabParallelHead)
    )
    rotary = None
    layers = [LayerDef("embed.tokens", table, tied_key="tokens" if cfg.tied_head else None)]
    if cfg.positions is Positions.learned:
        layers.append(LayerDef("embed.positions", partial(LearnedPositions, cfg)))
    else:
        rotary = RotaryTable(cfg.max_positions, head_dim(cfg), cfg.rotary_base, ctx.device)
    # One stream for all blocks: with one each, every block would drop the same attention weights.
    rng = ShardedRng(tp) if cfg.attention_dropout > 0 else None
    block = partial(Block, cfg, tp, attention, rotary, rng)
    layers += [LayerDef(f"block.{i}", block) for i in range(cfg.num_layers)]
    layers.append(LayerDef("final_norm", partial(make_norm, cfg)))
    if cfg.tied_head:
        layers.append(LayerDef("head", table, tied_key="tokens", run=_tied_logits))
    else:
        layers.append(LayerDef("head", head))
    return layers


class NextTokenLoss(nn.Module):
    """Mean cross-entropy in nats over the tokens of a micro-batch."""

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext) -> None:
        super().__init__()
        self.vocab_size, self.tp = cfg.vocab_size, ctx.tp

    def forward(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        """Logits (B, S, this rank's columns) and targets (B, S) int64 -> scalar fp32, equal on all tp ranks."""
        return vocab_parallel_cross_entropy(logits_BSV, labels_BS, vocab_size=self.vocab_size, tp=self.tp).mean()
