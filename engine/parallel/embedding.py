"""Token embedding and output projection cut by vocabulary. Shapes: B batch, S sequence, D hidden, V vocabulary."""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from engine.dist.context import AxisGroup
from engine.parallel.fused_loss import Projection
from engine.parallel.logical import LogicalTensor, Role, make_parameter
from engine.parallel.sequence import enter, leave
from engine.parallel.split_linear import column_linear
from engine_kernels.ops import LinearCrossEntropyFn

Logits = TypeVar("Logits", Tensor, Projection)


class VocabParallelEmbedding(nn.Module):
    """A V x D table of which each rank holds `padded` / t consecutive rows.

    Serves as embedding and, when tied, as output projection too. Rows past V are padding: zero,
    never looked up, and masked by the loss, so that their gradient is exactly zero.
    """

    role: Role = "embedding"

    def __init__(
        self, vocab_size: int, hidden_size: int, *, padded: int, tp: AxisGroup, init_std: float, sequence: bool = False
    ) -> None:
        super().__init__()
        self.tp, self.sequence = tp, sequence
        self.stand_in: Tensor | None = None
        """Used instead of the weight, whose memory it shares, where something else than autograd adds up gradients."""
        self.rows = padded // tp.size
        self.first_row = self.rows * tp.rank
        logical = LogicalTensor((vocab_size, hidden_size), dim=0, padded=padded, init_std=init_std, role=self.role)
        self.weight = make_parameter((self.rows, hidden_size), logical)

    def forward(self, x: Tensor, *, project: bool = False) -> Tensor:
        """Token numbers (B, S) int64 -> residual stream (B, S or S/t, D); with `project` as `logits`.

        Both parts go through `forward`, because ZeRO-3 gathers a module's parameters when the module is called.
        """
        return self.logits(x) if project else self._look_up(x)

    def _table(self) -> Tensor:
        return self.weight if self.stand_in is None else self.stand_in

    def _look_up(self, tokens_BS: Tensor) -> Tensor:
        if self.tp.group is None:
            return F.embedding(tokens_BS, self._table())
        local = tokens_BS - self.first_row
        elsewhere = (local < 0) | (local >= self.rows)
        x_BSD = F.embedding(local.masked_fill(elsewhere, 0), self._table()).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return leave(x_BSD, self.tp, sequence=self.sequence)

    def logits(self, x: Tensor) -> Tensor:
        """Residual stream (B, S or S/t, D) -> this rank's columns of the logits, (B, S, padded / t)."""
        if self.sequence:
            # Put in order here, where positions are narrower than logits, next to which it is little to keep them all.
            return F.linear(enter(x, self.tp, sequence=True), self._table())
        return column_linear(x, self._table(), None, self.tp, sequence=False)

    def projection(self, x: Tensor, function: LinearCrossEntropyFn, scale: float) -> Projection:
        """What `logits`, times `scale`, would be made of, for a loss that is `function`."""
        x_BSD = enter(x, self.tp, sequence=self.sequence)
        return Projection(function=function, x_BSD=x_BSD, weight_VD=self._table, scale=scale)


class VocabParallelHead(VocabParallelEmbedding):
    """An output projection with a weight of its own."""

    role: Role = "head"

    def forward(self, x: Tensor, *, project: bool = True) -> Tensor:
        """Residual stream (B, S or S/t, D) -> this rank's columns of the logits, (B, S, padded / t)."""
        return super().forward(x, project=project)


class VocabParallelBias(nn.Module):
    """A bias per vocabulary entry, cut like the logits."""

    def __init__(self, vocab_size: int, padded: int, tp: AxisGroup) -> None:
        super().__init__()
        self.weight = make_parameter(
            (padded // tp.size,), LogicalTensor((vocab_size,), dim=0, padded=padded, decay=False)
        )

    def forward(self, logits_BSV: Logits) -> Logits:
        """This rank's columns of the logits, (B, S, padded / t), or what they would be made of."""
        if isinstance(logits_BSV, Projection):
            return logits_BSV._replace(bias_V=self.weight)
        return logits_BSV + self.weight
