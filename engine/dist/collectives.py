"""Collectives with gradients along one mesh axis.

copy and sum are the operators f and g of Megatron-LM (arXiv 1909.08053, section 3); scatter_sum and gather are those of
its sequence parallelism (arXiv 2205.05198, section 4.2.2), whose layers gather in `engine.parallel.linear`; exchange is that of
Ulysses (arXiv 2309.14509).
Each is the identity on an axis of one rank, so the same layer code runs without a process group. All ranks of the axis
call each with the same shapes. A dim that is cut is a multiple of the axis. A compiled graph breaks at each.

| operator    | forward        | adjoint (backward) |
|-------------|----------------|--------------------|
| copy        | identity       | all-reduce         |
| sum         | all-reduce     | identity           |
| collect     | all-gather     | own slice          |
| scatter_sum | reduce-scatter | all-gather         |
| gather      | all-gather     | reduce-scatter     |
| exchange    | all-to-all     | reverse all-to-all |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import AxisGroup

_Map = Callable[[Tensor, dist.ProcessGroup], Tensor]


class _Collective(torch.autograd.Function):
    """A linear map over the ranks, and its adjoint for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, forward: _Map, adjoint: _Map) -> Tensor:
        ctx.group, ctx.adjoint = group, adjoint
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.adjoint(grads[0], ctx.group), None, None, None


# Not traced: torch 2.11 compiles a Function whose forward works in place, as every collective does, to zero gradients.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _collective(x: Tensor, group: dist.ProcessGroup, forward: _Map, adjoint: _Map) -> Tensor:
    return cast(Tensor, _Collective.apply(x, group, forward, adjoint))  # type: ignore[no-untyped-call]


def _apply(x: Tensor, axis: AxisGroup, forward: _Map, adjoint: _Map) -> Tensor:
    return x if axis.group is None else _collective(x, axis.group, forward, adjoint)


def _identity(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)


def _cut(x: Tensor, dim: int, count: int) -> Tensor:
    """A view of `x` with `dim` as two dims: `count` slices, and what is in each."""
    return x.view(*x.shape[:dim], count, x.shape[dim] // count, *x.shape[dim + 1 :])


def _in_blocks(x: Tensor, dim: int, count: int) -> Tensor:
    """`x` as `count` slices of `dim`, each in one piece, in a new first dim. A view where `dim` is the outermost."""
    return _cut(x, dim, count).movedim(dim, 0).contiguous()


def _from_blocks(blocks: Tensor, dim: int) -> Tensor:
    """The blocks in the first dim one after the other along `dim`. A view where `dim` is the outermost."""
    return blocks.movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Of a copy: autograd may hand the same gradient to others.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """The ranks' slices in rank order along `dim`; no gradient."""
    joined = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(joined, x.contiguous(), group=group)
    return _from_blocks(_cut(joined, 0, group.size()), dim)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """This rank's slice along `dim` of the sum of the ranks' `x`; no gradient."""
    # torch's gloo has this call too: an all-reduce of which each rank keeps its block.
    blocks = _in_blocks(x, dim, group.size())
    mine = torch.empty_like(blocks[0])
    dist.reduce_scatter_tensor(mine, blocks.flatten(0, 1), group=group)
    return mine


def _own_slice(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    return _cut(x, dim, group.size()).select(dim, group.rank()).contiguous()


def _all_to_all(x: Tensor, group: dist.ProcessGroup, split_dim: int, gather_dim: int) -> Tensor:
    blocks = _in_blocks(x, split_dim, group.size())
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, group=group)
    return _from_blocks(received, gather_dim)


def copy_to_axis(x: Tensor, axis: AxisGroup) -> Tensor:
    """Enter a sharded region: `x` (any shape, equal on all ranks) unchanged; its gradient is summed over the axis."""
    return _apply(x, axis, _identity, _all_reduce)


def sum_over_axis(x: Tensor, axis: AxisGroup) -> Tensor:
    """Leave a sharded region: the sum of the ranks' partial `x` (any shape); the gradient passes through."""
    return _apply(x, axis, _all_reduce, _identity)


def collect_over_axis(x: Tensor, axis: AxisGroup, dim: int = 1) -> Tensor:
    """The ranks' slices in rank order along `dim`, for a computation that is the same on all ranks.

    So is the gradient of the whole, of which the backward pass keeps the own slice.
    """
    dim %= x.dim()
    return _apply(x, axis, partial(all_gather, dim=dim), partial(_own_slice, dim=dim))


def scatter_sum_over_axis(x: Tensor, axis: AxisGroup, dim: int = 1) -> Tensor:
    """This rank's slice along `dim` of the sum of the ranks' partial `x`; the gradient's slices are gathered."""
    dim %= x.dim()
    return _apply(x, axis, partial(reduce_scatter, dim=dim), partial(all_gather, dim=dim))


def gather_over_axis(x: Tensor, axis: AxisGroup, dim: int = 1) -> Tensor:
    """Enter a sharded region from slices: the ranks' in rank order along `dim`; their gradients are summed and cut."""
    dim %= x.dim()
    return _apply(x, axis, partial(all_gather, dim=dim), partial(reduce_scatter, dim=dim))


def exchange_over_axis(x: Tensor, axis: AxisGroup, *, split_dim: int, gather_dim: int) -> Tensor:
    """Whole along `split_dim` and cut along `gather_dim` becomes the other way round.

    Slice r of `split_dim` goes to rank r; what arrives is joined along `gather_dim` in rank order. The gradient takes
    the reverse way.
    """
    split, gather = split_dim % x.dim(), gather_dim % x.dim()
    there = partial(_all_to_all, split_dim=split, gather_dim=gather)
    back = partial(_all_to_all, split_dim=gather, gather_dim=split)
    return _apply(x, axis, there, back)
