"""LAMB: Adam's direction, scaled in each tensor to the norm of its weights (arXiv 1904.00962, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.dist.context import ParallelContext
from engine.optim.adam import adam_direction
from engine.optim.pieces import Item, LogicalOptimizer, each_piece


class Lamb(LogicalOptimizer):
    """u = Adam's bias-corrected direction + decay w; w <- w - lr |w|/|u| u, with norms over the logical tensor.

    The ratio is 1 where a norm is 0. Tensors that are not decayed (norms and biases) have neither ratio nor decay.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        ctx: ParallelContext,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0}, ctx)

    def update(self, items: Sequence[Item]) -> None:
        """See `LogicalOptimizer.update`."""
        directions = {item.tensor: self._direction(item) for item in items}
        scaled = [(item, piece) for item, piece in each_piece(items) if piece.logical.decay]
        squares = [
            torch.stack([_square_sum(piece.of(item.tensor)), _square_sum(piece.of(directions[item.tensor]))])
            for item, piece in scaled
        ]
        sums = self.sum_over_ranks(squares, [piece for _, piece in scaled])
        for (item, piece), (weight, update) in zip(scaled, sums, strict=True):
            ratio = torch.where((weight > 0) & (update > 0), (weight / update).sqrt(), 1.0)
            piece.of(directions[item.tensor]).mul_(ratio.float())
        for item in items:
            item.tensor.add_(directions[item.tensor], alpha=-item.group["lr"])

    def _direction(self, item: Item) -> Tensor:
        group, state = item.group, self.state[item.tensor]
        direction = adam_direction(item.gradient, state, self.counted_step(item), group["betas"], group["eps"])
        return direction.add_(item.tensor, alpha=group["weight_decay"])


def _square_sum(x: Tensor) -> Tensor:
    # fp64, so that the number of ranks that share a sum does not show in it.
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
