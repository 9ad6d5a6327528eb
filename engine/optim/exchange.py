"""A function of whole matrices, computed once per matrix by ranks that each hold pieces of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import ParallelContext
from engine.optim.pieces import Piece
from engine.parallel.logical import LogicalTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece and its elements, flat."""

    piece: Piece
    values: Tensor


@dataclass(frozen=True, slots=True)
class _Run:
    """Elements `start` to `start + size` of a flattened slice."""

    start: int
    size: int


class Exchange:
    """Brings the pieces of matrix k to rank k modulo the size of `ctx.reduce`, and that rank's results back.

    The tensor-parallel ranks that hold slices of a matrix assemble it each for itself.
    """

    def __init__(self, ctx: ParallelContext) -> None:
        self._ctx = ctx
        self._runs: dict[Piece, list[_Run]] = {}

    def learn(self, pieces: Sequence[Piece]) -> None:
        """Hear which run of each slice every rank of `ctx.reduce` holds. Collective over it."""
        reduce = self._ctx.reduce
        mine = torch.tensor([(p.start, p.size) for p in pieces], dtype=torch.int64, device=self._ctx.device)
        every = [torch.empty_like(mine) for _ in range(reduce.size)]
        dist.all_gather(every, mine, group=reduce.group)
        by_rank = [ranges.tolist() for ranges in every]
        self._runs = {piece: [_Run(*ranges[i]) for ranges in by_rank] for i, piece in enumerate(pieces)}

    def apply(self, function: Callable[[Tensor, LogicalTensor], Tensor], parts: Sequence[Part]) -> list[Tensor]:
        """For each part its elements of `function(matrix, logical)`, flat, where `matrix` is the whole tensor.

        Collective over `ctx.reduce` and `ctx.tp`: all ranks bring parts of the same tensors in the same order. Ranks
        bring disjoint parts after `learn`, otherwise each a whole slice.
        """
        reduce = self._ctx.reduce
        owned = [part for i, part in enumerate(parts) if i % reduce.size == reduce.rank]
        wholes = self._assembled([part.piece for part in owned], self._collected(parts, owned))
        tp = self._ctx.tp
        results = [
            part.piece.logical.local_slice(function(whole, part.piece.logical), tp.rank, tp.size).reshape(-1)
            for part, whole in zip(owned, wholes, strict=True)
        ]
        return self._returned(parts, owned, results)

    def _held(self, piece: Piece, rank: int) -> _Run:
        return self._runs[piece][rank] if self._runs else _Run(0, piece.size)

    def _collected(self, parts: Sequence[Part], owned: Sequence[Part]) -> list[Tensor]:
        """This rank's tensor-parallel slices of the owned tensors, flat."""
        if not self._runs:
            return [part.values for part in owned]
        size = self._ctx.reduce.size
        sent = [[part.values for part in parts[rank::size]] for rank in range(size)]
        runs = [[self._held(part.piece, rank) for part in owned] for rank in range(size)]
        received = self._all_to_all(parts, sent, [[run.size for run in row] for row in runs])
        slices = [part.values.new_empty(torch.Size(part.piece.local_shape).numel()) for part in owned]
        for row, values in zip(runs, received, strict=True):
            for slice_, run, value in zip(slices, row, values, strict=True):
                slice_.narrow(0, run.start, run.size).copy_(value)
        return slices

    def _returned(self, parts: Sequence[Part], owned: Sequence[Part], results: Sequence[Tensor]) -> list[Tensor]:
        """Each part's elements of the results that the ranks have."""
        reduce = self._ctx.reduce
        if reduce.group is None:
            return list(results)
        sent = []
        for rank in range(reduce.size):
            runs = [self._held(part.piece, rank) for part in owned]
            sent.append([r.narrow(0, run.start, run.size) for r, run in zip(results, runs, strict=True)])
        sizes = [[part.piece.size for part in parts[rank :: reduce.size]] for rank in range(reduce.size)]
        received = self._all_to_all(parts, sent, sizes)
        return [received[i % reduce.size][i // reduce.size] for i in range(len(parts))]

    def _all_to_all(
        self, parts: Sequence[Part], sent: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]]
    ) -> list[tuple[Tensor, ...]]:
        """Give `sent[rank]` to each rank; from each rank tensors of `sizes[rank]` elements."""
        if not parts:
            return [() for _ in sizes]
        empty = parts[0].values.new_empty(0)
        rows = [torch.cat([empty, *row]) for row in sent]
        totals = [sum(row) for row in sizes]
        output = empty.new_empty(sum(totals))
        splits = [len(row) for row in rows]
        dist.all_to_all_single(output, torch.cat(rows), totals, splits, group=self._ctx.reduce.group)
        return [tuple(o.split(list(row))) for o, row in zip(output.split(totals), sizes, strict=True)]

    def _assembled(self, pieces: Sequence[Piece], slices: Sequence[Tensor]) -> list[Tensor]:
        """The whole logical tensors of this rank's `slices`."""
        tp = self._ctx.tp
        cut = [i for i, piece in enumerate(pieces) if piece.logical.dim is not None]
        of_ranks: dict[int, list[Tensor]] = {i: [s] for i, s in enumerate(slices)}
        if tp.group is not None and cut:
            mine = torch.cat([slices[i] for i in cut])
            every = [torch.empty_like(mine) for _ in range(tp.size)]
            dist.all_gather(every, mine, group=tp.group)
            split = [values.split([slices[i].numel() for i in cut]) for values in every]
            of_ranks.update({i: [values[k] for values in split] for k, i in enumerate(cut)})
        return [
            piece.logical.assemble([s.view(piece.local_shape) for s in of_ranks[i]]) for i, piece in enumerate(pieces)
        ]
