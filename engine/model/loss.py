"""Losses as shares of the global batch's mean. Shapes: B batch, S sequence, V this rank's columns of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config.enums import SentenceHead
from engine.config.schema import ModelConfig
from engine.config.schema_training import TrainingConfig
from engine.dist.context import AxisGroup, ParallelContext
from engine.model.batch import IGNORE
from engine.model.feed import Feed
from engine.parallel.cross_entropy import vocab_parallel_cross_entropy
from engine.parallel.fused_loss import Projection, projected_cross_entropy


class TokenLoss(nn.Module):
    """Cross-entropy in nats, with label smoothing and z-loss, of next-token and masked-token models."""

    def __init__(self, cfg: ModelConfig, train: TrainingConfig, tp: AxisGroup) -> None:
        super().__init__()
        self.vocab_size, self.tp = cfg.vocab_size, tp
        self.smoothing, self.z_loss = train.label_smoothing, train.z_loss

    def forward(self, logits_BSV: Tensor | Projection, labels_BS: Tensor, targets: Tensor) -> Tensor:
        """This micro-batch's share of the mean over all `targets` of the global batch; scalar fp32.

        Each target weighs the same, wherever it is: micro-batches and ranks with fewer of them weigh less. The sum of
        the shares of all micro-batches, dp and cp ranks is the loss. Equal on all tp ranks. Instead of logits what they
        would be made of, where the loss is fused with the projection.
        """
        options: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "tp": self.tp,
            "smoothing": self.smoothing,
            "z_loss": self.z_loss,
        }
        if isinstance(logits_BSV, Projection):
            return projected_cross_entropy(logits_BSV, labels_BS, targets, **options)
        return vocab_parallel_cross_entropy(logits_BSV, labels_BS, **options).sum() / targets


class NextTokenLoss(TokenLoss):
    """Loss of `gpt`: logits (B, S, V) and a feed."""

    def forward(self, logits_BSV: Tensor | Projection, feed: Feed) -> Tensor:  # type: ignore[override]
        """See `TokenLoss`."""
        return super().forward(logits_BSV, feed.labels_BS, feed.targets)


class PretrainingLoss(TokenLoss):
    """Loss of `bert`: masked tokens, plus the mean over all samples of the sentence head's cross-entropy."""

    def __init__(self, cfg: ModelConfig, train: TrainingConfig, ctx: ParallelContext) -> None:
        super().__init__(cfg, train, ctx.tp)
        self.sentence = cfg.sentence_head is not SentenceHead.none
        # Every context-parallel rank computes the sentence head, from the first one's token; one counts it.
        self.counts = ctx.cp.is_first

    def forward(self, outputs: tuple[Tensor | Projection, Tensor | None], feed: Feed) -> Tensor:  # type: ignore[override]
        """Logits (B, S, V) and classes (B, 2), or None without a sentence head. See `TokenLoss`."""
        logits_BSV, classes_B2 = outputs
        share = super().forward(logits_BSV, feed.labels_BS, feed.targets)
        if classes_B2 is None:
            return share
        assert feed.sentence_B is not None, "the data gives no sentence classes"
        total = F.cross_entropy(classes_B2.float(), feed.sentence_B, ignore_index=IGNORE, reduction="sum")
        return share + total * float(self.counts) / feed.sentences
