"""Muon: the momentum of each hidden matrix, made orthogonal (Keller Jordan, kellerjordan.github.io/posts/muon).

With the scale of Moonlight (arXiv 2502.16982, section 2.2), 0.2 sqrt(max(rows, columns)), the update has the root mean
square of AdamW's, so that AdamW's learning rate and weight decay carry over. The fused parts of a matrix (query, key
and value; gate and up) are matrices of their own. Embeddings, output projections, norms and biases get AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.dist.context import ParallelContext
from engine.optim.adam import adam_direction
from engine.optim.exchange import Exchange, Part
from engine.optim.pieces import Item, LogicalOptimizer, Piece, each_piece
from engine.parallel.logical import LogicalTensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS, _SCALE = 5, 0.2


def orthogonalized(matrix: Tensor) -> Tensor:
    """`matrix` (rows, columns) with all singular values near 1 (0.7 to 1.2), by five quintic Newton-Schulz steps.

    In the dtype of `matrix`. Muon is often run in bf16; here it is fp32 like the rest of the optimizer, because the
    rounding of bf16 would tell one layout from another.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / torch.linalg.vector_norm(wide).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon_update(momentum: Tensor, logical: LogicalTensor) -> Tensor:
    """The scaled update of a whole logical matrix from its momentum, both of shape `logical.shape`."""
    dim = logical.dim or 0
    parts = momentum.split(logical.segments or (momentum.shape[dim],), dim=dim)
    return torch.cat([orthogonalized(p) * (_SCALE * math.sqrt(max(p.shape))) for p in parts], dim=dim)


class Muon(LogicalOptimizer):
    """w <- w - lr (update + decay w), the update from Nesterov's momentum g + mu (m - g) with m <- mu m + (1 - mu) g.

    Groups with `orthogonal` true hold hidden matrices. The matrices are shared out among the ranks of `ctx.reduce`:
    one collective brings the momentum to the ranks that work on it and one brings the updates back.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        ctx: ParallelContext,
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, {**defaults, "orthogonal": False}, ctx)
        self._exchange = Exchange(ctx)

    def attach(self, pieces: Mapping[Tensor, Sequence[Piece]], *, sharded: bool) -> None:
        """See `LogicalOptimizer.attach`. Collective over `ctx.reduce`."""
        super().attach(pieces, sharded=sharded)
        if self.shards is not None:
            self._exchange.learn([piece for parts in pieces.values() for piece in parts])

    def update(self, items: Sequence[Item]) -> None:
        """See `LogicalOptimizer.update`."""
        for item in items:
            item.tensor.mul_(1 - item.group["lr"] * item.group["weight_decay"])
            if not item.group["orthogonal"]:
                group, state = item.group, self.state[item.tensor]
                step = self.counted_step(item)
                direction = adam_direction(item.gradient, state, step, group["betas"], group["eps"])
                item.tensor.add_(direction, alpha=-group["lr"])
        matrices = [item for item in items if item.group["orthogonal"]]
        nesterov = {item.tensor: self._momentum(item) for item in matrices}
        pairs = list(each_piece(matrices))
        parts = [Part(piece=piece, values=piece.of(nesterov[item.tensor])) for item, piece in pairs]
        updates = self._exchange.apply(muon_update, parts)
        for (item, piece), update in zip(pairs, updates, strict=True):
            piece.of(item.tensor).add_(update, alpha=-item.group["lr"])

    def _momentum(self, item: Item) -> Tensor:
        state, mu = self.state[item.tensor], item.group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(item.tensor)
        mean = state["momentum_buffer"].lerp_(item.gradient, 1 - mu)
        return item.gradient.lerp(mean, mu)
