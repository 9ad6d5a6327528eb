"""Adafactor: second moments of matrices as a row and a column of means (arXiv 1804.04235).

Of the paper's options: factored second moment for matrices (algorithm 4; whole for vectors, algorithm 5), decay
1 - t^-0.8 (section 7.2), update clipping at d = 1 (section 6), eps1 = 1e-30. The rate comes from outside: neither
relative step sizes nor scaling by the parameter's norm (section 8), no momentum; weight decay is decoupled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.dist.context import AxisGroup, ParallelContext
from engine.optim.pieces import Item, LogicalOptimizer, Piece
from engine.parallel.logical import LogicalTensor

_DECAY, _CLIP, _EPS = 0.8, 1.0, 1e-30


@dataclass(frozen=True, slots=True)
class _Window:
    """The rows of a slice that a piece touches, and where rows and columns stand in the logical matrix.

    Numbers count from 1; 0 is the place of padding, whose sums are dropped.
    """

    piece: Piece
    first: int
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, piece: Piece, tp: AxisGroup, device: torch.device) -> _Window:
        logical, width = piece.logical, piece.local_shape[1]
        first, end = piece.start // width, -(-(piece.start + piece.size) // width)
        if piece.size == 0:
            first = end = 0
        numbers = []
        for dim in (0, 1):
            whole = torch.arange(1, logical.shape[dim] + 1, device=device)
            if dim == logical.dim:
                # The rule of the slices cuts the numbers as it cuts the matrix.
                view = whole.view(-1, 1) if dim == 0 else whole.view(1, -1)
                whole = logical.local_slice(view, tp.rank, tp.size).reshape(-1)
            numbers.append(whole)
        return cls(piece=piece, first=first, rows=numbers[0][first:end], columns=numbers[1])

    def sums(self, values: Tensor) -> Tensor:
        """Row and column sums of the piece's `values`, at their places in the logical matrix: (rows + columns)."""
        height, width = self.piece.logical.shape
        padded = values.new_zeros(len(self.rows), len(self.columns))
        padded.view(-1).narrow(0, self._skipped, self.piece.size).copy_(values)
        by_row = values.new_zeros(height + 1).index_add_(0, self.rows, padded.sum(1))
        by_column = values.new_zeros(width + 1).index_add_(0, self.columns, padded.sum(0))
        return torch.cat([by_row[1:], by_column[1:]])

    def spread(self, row: Tensor, column: Tensor) -> Tensor:
        """The piece's elements of the outer product of `row` and `column`, which are 0 at padding."""
        row, column = torch.cat([row.new_zeros(1), row]), torch.cat([column.new_zeros(1), column])
        outer = torch.outer(row[self.rows], column[self.columns])
        return outer.view(-1).narrow(0, self._skipped, self.piece.size)

    @property
    def _skipped(self) -> int:
        return self.piece.start - self.first * len(self.columns) if self.piece.size else 0


class Adafactor(LogicalOptimizer):
    """u = g / sqrt(v), divided by max(1, RMS(u)) of the logical tensor; w <- w - lr (u + decay w)."""

    def __init__(self, groups: Iterable[dict[str, Any]], ctx: ParallelContext, *, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0}, ctx)
        self._windows: dict[Piece, _Window] = {}

    def update(self, items: Sequence[Item]) -> None:
        """See `LogicalOptimizer.update`."""
        kept = {item.tensor: 1.0 - self.counted_step(item) ** -_DECAY for item in items}
        updates = {item.tensor: self._vector_update(item, kept[item.tensor]) for item in items}
        matrices = [(item, piece, means) for item in items for piece, means in self._means(item)]
        squares = [self._window(p, i.tensor).sums(p.of(i.gradient).square().add_(_EPS)) for i, p, _ in matrices]
        sums = self.sum_over_ranks(squares, [piece for _, piece, _ in matrices])
        for (item, piece, means), total in zip(matrices, sums, strict=True):
            height, width = piece.logical.shape
            row, column = means.split([height, width])
            row.lerp_(total[:height] / width, 1 - kept[item.tensor])
            column.lerp_(total[height:] / height, 1 - kept[item.tensor])
            factor = self._window(piece, item.tensor).spread((row / row.mean()).rsqrt_(), column.rsqrt())
            piece.of(updates[item.tensor]).copy_(piece.of(item.gradient) * factor)
        self._clip(items, updates)
        for item in items:
            lr = item.group["lr"]
            item.tensor.mul_(1 - lr * item.group["weight_decay"]).add_(updates[item.tensor], alpha=-lr)

    def _clip(self, items: Sequence[Item], updates: dict[Tensor, Tensor]) -> None:
        pairs = [(piece, piece.of(updates[item.tensor])) for item in items for piece in item.pieces]
        squares = [torch.linalg.vector_norm(u, dtype=torch.float64).square() for _, u in pairs]
        sums = self.sum_over_ranks(squares, [piece for piece, _ in pairs])
        for (piece, part), total in zip(pairs, sums, strict=True):
            rms = (total / torch.Size(piece.logical.shape).numel()).sqrt()
            part.div_((rms / _CLIP).clamp(min=1.0).float())

    def _vector_update(self, item: Item, kept: float) -> Tensor:
        """The update of the vectors in a tensor; zero where it holds matrices."""
        update = torch.zeros_like(item.gradient)
        for piece, moment in self._squares(item):
            gradient = piece.of(item.gradient)
            moment.lerp_(gradient.square().add_(_EPS), 1 - kept)
            piece.of(update).copy_(gradient * moment.rsqrt())
        return update

    def _squares(self, item: Item) -> list[tuple[Piece, Tensor]]:
        """Each piece of a vector in a tensor, with its second moment."""
        vectors, state = [piece for piece in item.pieces if len(piece.logical.shape) != 2], self.state[item.tensor]
        sizes = [piece.size for piece in vectors]
        if vectors and "square" not in state:
            state["square"] = item.tensor.new_zeros(sum(sizes))
        return list(zip(vectors, state["square"].split(sizes), strict=True)) if vectors else []

    def _means(self, item: Item) -> list[tuple[Piece, Tensor]]:
        """Each matrix in a tensor, with the row and column means of its second moment, one after the other."""
        matrices = [piece for piece in item.pieces if len(piece.logical.shape) == 2]
        sizes, state = [sum(piece.logical.shape) for piece in matrices], self.state[item.tensor]
        if matrices and "means" not in state:
            state["means"] = item.tensor.new_zeros(sum(sizes))
        return list(zip(matrices, state["means"].split(sizes), strict=True)) if matrices else []

    def moments(self, tensor: Tensor, pieces: Sequence[Piece]) -> Iterator[tuple[str, Piece, Tensor, bool]]:
        """The second moments of a tensor for a checkpoint: kind, piece, values, and whether all ranks hold the same.

        Row and column means are vectors of their own, whole on each rank; `pieces` are those of `attach`.
        """
        item = Item(tensor=tensor, group={}, pieces=tuple(pieces))
        for piece, means in self._means(item):
            for kind, values in zip(("row_mean", "column_mean"), means.split(piece.logical.shape), strict=True):
                logical = LogicalTensor(shape=tuple(values.shape), name=piece.logical.name)
                whole = replace(piece, logical=logical, local_shape=logical.shape, start=0, size=values.numel())
                yield kind, whole, values, True
        for piece, square in self._squares(item):
            if piece.size:
                yield "square", piece, square, False

    def _window(self, piece: Piece, tensor: Tensor) -> _Window:
        if piece not in self._windows:
            self._windows[piece] = _Window.of(piece, self.ctx.tp, tensor.device)
        return self._windows[piece]
