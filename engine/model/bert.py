"""BERT (arXiv 1810.04805) as a list of layers.

Shapes: B batch, S positions of this cp rank, L of its residual stream, D hidden.

Post-norm blocks, three embeddings, the masked-token head and, if asked for, the sentence head over the pooled first
token. Parameters correspond one to one to those of transformers' `BertForPreTraining`.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.derived import padded_vocab
from engine.config.enums import SentenceHead
from engine.config.schema import Config, ModelConfig
from engine.dist.collectives import collect_over_axis
from engine.dist.context import AxisGroup, ParallelContext
from engine.model.block import matrix_std
from engine.model.feed import Feed
from engine.model.gpt import (
    LearnedPositions,
    block_layers,
    drop_embeddings,
    embed_tokens,
    project,
    uses_sequence,
    vocabulary,
)
from engine.model.layers import LayerDef
from engine.model.norm import make_norm
from engine.parallel.embedding import VocabParallelBias
from engine.parallel.fused_loss import Projection
from engine.parallel.linear import ReplicatedLinear
from engine.parallel.logical import LogicalTensor, make_parameter
from engine.parallel.sequence import whole
from engine_kernels.ops import Kernels

Outputs = tuple[Tensor | Projection, Tensor | None]
"""Hidden states (B, L, D), logits (B, S, this rank's columns) or what makes them; and sentence classes (B, 2)."""


class TokenTypes(nn.Module):
    """Adds a learned vector per segment."""

    def __init__(self, cfg: ModelConfig, tp: AxisGroup, sequence: bool) -> None:
        super().__init__()
        self.tp, self.sequence = tp, sequence
        shape = (cfg.token_types, cfg.hidden_size)
        self.weight = make_parameter(shape, LogicalTensor(shape, init_std=cfg.init_std, role="embedding"))

    def forward(self, x_BLD: Tensor, types_BL: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, L, D); without `types_BL` every token is in segment 0."""
        table = whole(self.weight, self.tp, sequence=self.sequence)
        return x_BLD + (table[0] if types_BL is None else F.embedding(types_BL, table))


class EmbeddingRest(nn.Module):
    """Positions and segments on top of the token embedding, then the norm."""

    def __init__(self, cfg: ModelConfig, tp: AxisGroup, sequence: bool, kernels: Kernels) -> None:
        super().__init__()
        self.positions = LearnedPositions(cfg, tp, sequence)
        self.types = TokenTypes(cfg, tp, sequence) if cfg.token_types else None
        self.norm = make_norm(cfg, tp, kernels, sequence=sequence)

    def forward(self, x_BLD: Tensor, feed: Feed) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x_BLD = self.positions(x_BLD, feed.positions_L)
        if self.types is not None:
            x_BLD = self.types(x_BLD, feed.types_BL)
        out: Tensor = self.norm(x_BLD)
        return out


class HeadTransform(nn.Module):
    """Dense, GELU and norm before the vocabulary projection; pooler and sentence classes from the first token."""

    def __init__(self, cfg: ModelConfig, tp: AxisGroup, sequence: bool, kernels: Kernels) -> None:
        super().__init__()
        self.tp, self.sequence, self.gelu = tp, sequence, kernels.gelu
        width = cfg.hidden_size
        dense = partial(ReplicatedLinear, width, tp=tp, bias=cfg.bias, init_std=matrix_std(cfg))
        self.dense = dense(width, sequence=sequence)
        self.norm = make_norm(cfg, tp, kernels, sequence=sequence)
        sentence = cfg.sentence_head is not SentenceHead.none
        # The first token is the same on all tp ranks, so these see all of it.
        self.pooler = dense(width, sequence=False) if sentence else None
        self.classes = dense(2, sequence=False) if sentence else None

    def forward(self, x_BLD: Tensor) -> Outputs:
        """(B, L, D) -> (B, L, D) and classes (B, 2)."""
        hidden: Tensor = self.norm(self.gelu(self.dense(x_BLD), approximate="none"))
        if self.pooler is None or self.classes is None:
            return hidden, None
        first_BD = x_BLD[:, :1]
        if self.sequence:
            first_BD = collect_over_axis(first_BD.contiguous(), self.tp)[:, :1]
        return hidden, self.classes(torch.tanh(self.pooler(first_BD.squeeze(1))))


def _embed_rest(cfg: ModelConfig, module: nn.Module, x_BLD: Tensor, feed: Feed) -> Tensor:
    return drop_embeddings(cfg, module, module(x_BLD, feed), feed)


def _transform(module: nn.Module, x_BLD: Tensor, _: Feed) -> Outputs:
    outputs: Outputs = module(x_BLD)
    return outputs


def _project(kernels: Kernels, module: nn.Module, outputs: Outputs, _: Feed) -> Outputs:
    hidden_BLD, classes_B2 = outputs
    assert isinstance(hidden_BLD, Tensor)
    return project(module, hidden_BLD, kernels, 1.0), classes_B2


def _add_bias(module: nn.Module, outputs: Outputs, _: Feed) -> Outputs:
    return module(outputs[0]), outputs[1]


def bert_layers(cfg: Config, ctx: ParallelContext, kernels: Kernels) -> list[LayerDef]:
    """Embeddings, post-norm blocks, and heads that share a stage: logits (B, S, this rank's columns) and classes."""
    model, tp, sequence = cfg.model, ctx.tp, uses_sequence(cfg, ctx)
    table, head, tied = vocabulary(cfg, ctx)
    bias = partial(VocabParallelBias, model.vocab_size, padded_vocab(model, tp.size), tp)
    return [
        LayerDef("embed.tokens", table, embed_tokens, tied),
        LayerDef("embed.rest", partial(EmbeddingRest, model, tp, sequence, kernels), partial(_embed_rest, model)),
        *block_layers(cfg, ctx, kernels),
        LayerDef("head.transform", partial(HeadTransform, model, tp, sequence, kernels), _transform),
        LayerDef("head", head, partial(_project, kernels), tied, glued=True),
        LayerDef("head.bias", bias, _add_bias, glued=True),
    ]
