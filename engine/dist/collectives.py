"""Collectives with gradients along one mesh axis.

copy and sum are the operators f and g of Megatron-LM (arXiv 1909.08053, section 3); scatter_sum and gather are those of
its sequence parallelism (arXiv 2205.05198, section 4.2.2), whose layers are in `engine.parallel.overlap`; exchange is
that of Ulysses (arXiv 2309.14509).
Each is the identity on an axis of one rank, so the same layer code runs without a process group. All ranks of the axis
call each with the same shapes. A dim that is cut is a multiple of the axis.

| operator    | forward        | adjoint (backward) |
|-------------|----------------|--------------------|
| copy        | identity       | sum                |
| sum         | all-reduce     | copy               |
| collect     | all-gather     | cut                |
| cut         | own slice      | collect            |
| scatter_sum | reduce-scatter | gather             |
| gather      | all-gather     | scatter_sum        |
| exchange    | all-to-all     | exchange, reversed |

All are one custom operation, which a compiled graph holds as a node: torch 2.11 compiles an autograd function that works
in place, as collectives do, to a gradient of zero.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from engine.dist.context import AxisGroup

_ADJOINT = {
    "copy": "sum",
    "sum": "copy",
    "collect": "cut",
    "cut": "collect",
    "scatter_sum": "gather",
    "gather": "scatter_sum",
    "exchange": "exchange",
}


def resolve(group: str) -> dist.ProcessGroup:
    """The process group of this name: compiled graphs hold strings, not groups."""
    return _resolve_process_group(cast(Any, group))


def _cut(x: Tensor, dim: int, count: int) -> Tensor:
    """A view of `x` with `dim` as two dims: `count` slices, and what is in each."""
    return x.view(*x.shape[:dim], count, x.shape[dim] // count, *x.shape[dim + 1 :])


def packed(x: Tensor) -> Tensor:
    """`x` without gaps, the same bits; no gradient. Rows of whole 16 bytes are copied 16 at a time.

    torch copies a tensor whose dims are in another order element by element, in 16 bits at a third of the bandwidth.
    """
    if x.is_contiguous() or not x.numel():
        return x.contiguous()
    size, last = x.element_size(), x.dim() - 1
    steps = [x.storage_offset(), x.shape[last], *x.stride()[:last]]
    if size >= 16 or x.is_neg() or x.stride(last) != 1 or x.data_ptr() % 16 or any(step * size % 16 for step in steps):
        return x.contiguous()
    return x.view(torch.complex128).contiguous().view(x.dtype)


def _in_blocks(x: Tensor, dim: int, count: int) -> Tensor:
    """`x` as `count` slices of `dim`, each in one piece, in a new first dim. A view where `dim` is the outermost."""
    return packed(_cut(x.contiguous(), dim, count).movedim(dim, 0))


def _from_blocks(blocks: Tensor, dim: int) -> Tensor:
    """The blocks in the first dim one after the other along `dim`. A view where `dim` is the outermost."""
    return packed(blocks.movedim(0, dim)).flatten(dim, dim + 1)


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


def _all_to_all(x: Tensor, group: dist.ProcessGroup, split_dim: int, gather_dim: int) -> Tensor:
    blocks = _in_blocks(x, split_dim, group.size())
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, group=group)
    return _from_blocks(received, gather_dim)


@torch.library.custom_op("octant::collective", mutates_args=())
def _collective(x: Tensor, operator: str, dim: int, other: int, group: str) -> Tensor:
    """`other` is the dim along which exchange joins."""
    ranks = resolve(group)
    match operator:
        case "copy" | "sum":
            # A copy: a custom operation may not return its input, and autograd may hand a gradient to others too.
            total = x.clone(memory_format=torch.contiguous_format)
            if operator == "sum":
                dist.all_reduce(total, group=ranks)
            return total
        case "gather" | "collect":
            return all_gather(x, ranks, dim)
        case "scatter_sum":
            return reduce_scatter(x, ranks, dim)
        case "cut":
            return _cut(x.contiguous(), dim, ranks.size()).select(dim, ranks.rank()).clone()
        case _:
            return _all_to_all(x, ranks, dim, other)


@_collective.register_fake
def _(x: Tensor, operator: str, dim: int, other: int, group: str) -> Tensor:
    shape, ranks = list(x.shape), resolve(group).size()
    if operator in ("scatter_sum", "cut", "exchange"):
        shape[dim] = shape[dim] // ranks
    if operator in ("gather", "collect", "exchange"):
        join = other if operator == "exchange" else dim
        shape[join] = shape[join] * ranks
    return x.new_empty(shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.call = inputs[1:]


def _adjoint(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    operator, dim, other, group = ctx.call
    if operator == "sum":
        return grad, None, None, None, None
    if operator == "exchange":
        dim, other = other, dim
    return _collective(grad, _ADJOINT[operator], dim, other, group), None, None, None, None


_collective.register_autograd(_adjoint, setup_context=_remember)


def _apply(x: Tensor, axis: AxisGroup, operator: str, dim: int = 0, other: int = 0) -> Tensor:
    return _collective(x, operator, dim % x.dim(), other % x.dim(), axis.name) if axis.name else x


def copy_to_axis(x: Tensor, axis: AxisGroup) -> Tensor:
    """Enter a sharded region: `x` (any shape, equal on all ranks) unchanged; its gradient is summed over the axis."""
    return _apply(x, axis, "copy")


def sum_over_axis(x: Tensor, axis: AxisGroup) -> Tensor:
    """Leave a sharded region: the sum of the ranks' partial `x` (any shape); the gradient passes through."""
    return _apply(x, axis, "sum")


def collect_over_axis(x: Tensor, axis: AxisGroup, dim: int = 1) -> Tensor:
    """The ranks' slices in rank order along `dim`, for a computation that is the same on all ranks.

    So is the gradient of the whole, of which the backward pass keeps the own slice.
    """
    return _apply(x, axis, "collect", dim)


def scatter_sum_over_axis(x: Tensor, axis: AxisGroup, dim: int = 1) -> Tensor:
    """This rank's slice along `dim` of the sum of the ranks' partial `x`; the gradient's slices are gathered."""
    return _apply(x, axis, "scatter_sum", dim)


def gather_over_axis(x: Tensor, axis: AxisGroup, dim: int = 1) -> Tensor:
    """Enter a sharded region from slices: the ranks' in rank order along `dim`; their gradients are summed and cut."""
    return _apply(x, axis, "gather", dim)


def exchange_over_axis(x: Tensor, axis: AxisGroup, *, split_dim: int, gather_dim: int) -> Tensor:
    """Whole along `split_dim` and cut along `gather_dim` becomes the other way round.

    Slice r of `split_dim` goes to rank r; what arrives is joined along `gather_dim` in rank order. The gradient takes
    the reverse way.
    """
    return _apply(x, axis, "exchange", split_dim, gather_dim)
