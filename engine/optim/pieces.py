"""Optimizers that look at whole logical tensors, though a rank holds only pieces of them.

ZeRO hands an optimizer flat tensors: consecutive elements of the rank's tensor-parallel slices. A `Piece` says what
such a stretch is, and `LogicalOptimizer` sums over the ranks that hold the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import AxisGroup, ParallelContext
from engine.parallel.logical import LogicalTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive elements of this rank's slice of a logical tensor, and where the optimizer's tensor holds them."""

    logical: LogicalTensor
    local_shape: tuple[int, ...]
    """Shape of the tensor-parallel slice that the piece is from."""
    start: int
    """First element in the flattened slice."""
    offset: int
    """First element in the flattened tensor of the optimizer."""
    size: int
    """Elements. 0: the slice is held by other ranks, and this one only takes part in their collectives."""
    copy: bool = False
    """Whether an earlier pipeline stage holds the same tied weight, which names it and saves it."""

    def of(self, flat: Tensor) -> Tensor:
        """The piece's elements of a tensor laid out like the optimizer's."""
        return flat.view(-1).narrow(0, self.offset, self.size)

    def within(self, start: int, stop: int) -> Piece:
        """What of it a tensor holds that has the elements `start` to `stop` of the optimizer's."""
        first, last = max(self.offset, start), min(self.offset + self.size, stop)
        if first >= last:
            return replace(self, start=0, offset=0, size=0)
        return replace(self, start=self.start + first - self.offset, offset=first - start, size=last - first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A tensor with a gradient, its parameter group, and the pieces in it."""

    tensor: Tensor
    group: dict[str, Any]
    pieces: tuple[Piece, ...]

    @property
    def gradient(self) -> Tensor:
        assert self.tensor.grad is not None
        return self.tensor.grad


class LogicalOptimizer(torch.optim.Optimizer):
    """Base of the optimizers whose update of an element depends on the rest of its logical tensor.

    Every rank of the `reduce` and `tp` groups calls `step` with the same logical tensors in the same order.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any], ctx: ParallelContext) -> None:
        super().__init__(groups, defaults)
        self.ctx = ctx
        self.shards: AxisGroup | None = None
        """The ranks that hold the other pieces; None while every tensor is a whole slice."""
        self._pieces: dict[Tensor, tuple[Piece, ...]] = {}

    def attach(self, pieces: Mapping[Tensor, Sequence[Piece]], *, sharded: bool) -> None:
        """Tell what the tensors that replaced the parameters hold.

        Args:
            pieces: for each tensor a piece of every logical tensor of its group, in the same order on all ranks.
            sharded: whether the pieces of the ranks of `ctx.reduce` make up the slices. Otherwise each has all.
        """
        self.shards = self.ctx.reduce if sharded and self.ctx.reduce.group is not None else None
        self._pieces = {tensor: tuple(parts) for tensor, parts in pieces.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient.

        Raises:
            RuntimeError: a tensor is neither a parameter of the model nor attached.
        """
        items = [
            Item(tensor=tensor, group=group, pieces=self._pieces_of(tensor))
            for group in self.param_groups
            for tensor in group["params"]
            if tensor.grad is not None
        ]
        if items:
            self.update(items)

    @abstractmethod
    def update(self, items: Sequence[Item]) -> None:
        """One step of all `items`."""

    def counted_step(self, item: Item) -> int:
        """Number of this step of the tensor, from 1."""
        state = self.state[item.tensor]
        state["step"] = state.get("step", 0) + 1
        return int(state["step"])

    def sum_over_ranks(self, sums: Sequence[Tensor], pieces: Sequence[Piece]) -> list[Tensor]:
        """Sums over whole logical tensors from the sums over this rank's pieces, one collective per axis.

        Args:
            sums: one tensor per piece, of equal shape on all ranks; zeros where the piece is empty.
        """
        if not sums:
            return []
        sizes = [s.numel() for s in sums]
        flat = torch.cat([s.reshape(-1) for s in sums])
        if self.shards is not None:
            dist.all_reduce(flat, group=self.shards.group)
        parts = list(flat.split(sizes))
        cut = [i for i, piece in enumerate(pieces) if piece.logical.dim is not None]
        if self.ctx.tp.group is not None and cut:
            joined = torch.cat([parts[i] for i in cut])
            dist.all_reduce(joined, group=self.ctx.tp.group)
            for i, part in zip(cut, joined.split([sizes[i] for i in cut]), strict=True):
                parts[i] = part
        return [part.view(s.shape) for part, s in zip(parts, sums, strict=True)]

    def _pieces_of(self, tensor: Tensor) -> tuple[Piece, ...]:
        if tensor in self._pieces:
            return self._pieces[tensor]
        logical: LogicalTensor | None = getattr(tensor, "logical", None)
        if logical is None:
            raise RuntimeError(
                "The optimizer was given a tensor that is no parameter of the model: call attach_pieces "
                "after deepspeed.initialize, and before the first step."
            )
        return (Piece(logical=logical, local_shape=tuple(tensor.shape), start=0, offset=0, size=tensor.numel()),)


def each_piece(items: Iterable[Item]) -> Iterator[tuple[Item, Piece]]:
    """All pieces of all items, in order."""
    return ((item, piece) for item in items for piece in item.pieces)
