"""Token embedding and output projection cut by vocabulary. Shapes: B batch, S sequence, D hidden, V vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from engine.dist.collectives import copy_to_axis, sum_over_axis
from engine.dist.context import AxisGroup
from engine.parallel.logical import LogicalTensor, make_parameter


class VocabParallelEmbedding(nn.Module):
    """A V x D table of which each rank holds `padded` / t consecutive rows.

    Serves as embedding and, when tied, as output projection too. Rows past V are padding: zero,
    never looked up, and masked by the loss, so that their gradient is exactly zero.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, *, padded: int, tp: AxisGroup, init_std: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tp, self.dropout = tp, dropout
        self.rows = padded // tp.size
        self.first_row = self.rows * tp.rank
        logical = LogicalTensor((vocab_size, hidden_size), dim=0, padded=padded, init_std=init_std)
        self.weight = make_parameter((self.rows, hidden_size), logical)

    def forward(self, x: Tensor, *, project: bool = False) -> Tensor:
        """Token numbers (B, S) int64 -> (B, S, D), dropped, equal on all ranks; with `project` as `logits`.

        Both parts go through `forward`, because ZeRO-3 gathers a module's parameters when the module is called.
        """
        if project:
            return self.logits(x)
        return F.dropout(self._look_up(x), self.dropout, self.training)

    def _look_up(self, tokens_BS: Tensor) -> Tensor:
        if self.tp.group is None:
            return F.embedding(tokens_BS, self.weight)
        local = tokens_BS - self.first_row
        elsewhere = (local < 0) | (local >= self.rows)
        x_BSD = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return sum_over_axis(x_BSD.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.tp)

    def logits(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D), equal on all ranks -> this rank's columns of the logits, (B, S, padded / t)."""
        return F.linear(copy_to_axis(x_BSD, self.tp), self.weight)


class VocabParallelHead(VocabParallelEmbedding):
    """An output projection with a weight of its own."""

    def forward(self, x: Tensor, *, project: bool = True) -> Tensor:
        """(B, S, D), equal on all ranks -> this rank's columns of the logits, (B, S, padded / t)."""
        return super().forward(x, project=project)
