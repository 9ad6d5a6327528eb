"""Which model a configuration means."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from engine.config.enums import Family
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.bert import bert_layers
from engine.model.feed import Feed
from engine.model.gpt import gpt_layers
from engine.model.layers import LayerDef
from engine.model.loss import NextTokenLoss, PretrainingLoss
from engine.parallel.overlap_choice import choose_overlap
from engine_kernels.ops import Kernels


class ModelWithLoss(nn.Module):
    """A feed in, a share of the loss out: a scalar, fp32."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, feed: Feed) -> Tensor:
        """The share of `feed`."""
        share: Tensor = self.loss(self.model(None, feed), feed)
        return share


def build_layers(cfg: Config, ctx: ParallelContext, kernels: Kernels) -> list[LayerDef]:
    """The model as layers, first to last. Nothing is allocated but a rotary table. Collective where ctx has a tp group.

    Args:
        cfg: the rules of `engine.config.rules` hold for it.
        ctx: its tp and cp axes cut the layers, its device holds the rotary table.
        kernels: the chosen implementation of each operation.

    Raises:
        LaunchError: see `choose_overlap`.
    """
    ctx = replace(ctx, tp=replace(ctx.tp, overlap=choose_overlap(cfg.parallel.tp_overlap, ctx.tp, ctx.device)))
    family = {Family.gpt: gpt_layers, Family.bert: bert_layers}[cfg.model.family]
    return family(cfg, ctx, kernels)


def build_loss(cfg: Config, ctx: ParallelContext) -> nn.Module:
    """What takes the last layer's output and the feed to this micro-batch's share of the loss, scalar fp32."""
    if cfg.model.family is Family.bert:
        return PretrainingLoss(cfg.model, cfg.train, ctx)
    return NextTokenLoss(cfg.model, cfg.train, ctx.tp)
