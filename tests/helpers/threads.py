"""An axis of threads: the real layers and their collectives, without processes or a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist import collectives
from engine.dist.context import SINGLE, AxisGroup, ParallelContext
from engine.topology.grid import Coord, Grid

T = TypeVar("T")
_TIMEOUT_S = 30.0


class _Meeting:
    """Stands for a process group: ranks lay down a tensor each, and all of them see all."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=_TIMEOUT_S)
        self._parts: list[Tensor] = [torch.empty(0)] * size
        self._mine = threading.local()
        self.group_name = f"meeting {id(self)}"

    def join(self, rank: int) -> None:
        self._mine.rank = rank

    def rank(self) -> int:
        return int(self._mine.rank)

    def size(self) -> int:
        return len(self._parts)

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in rank order."""
        self._parts[self.rank()] = tensor.detach().clone()
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts

    def abort(self) -> None:
        self._barrier.abort()


def _all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> None:
    assert not async_op, "threads meet in person"
    parts = torch.stack(group.exchange(tensor))
    tensor.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))


def _all_gather(output: Tensor, mine: Tensor, group: Any = None) -> None:
    output.copy_(torch.cat(group.exchange(mine)))


def _reduce_scatter(output: Tensor, mine: Tensor, group: Any = None) -> None:
    total = torch.stack(group.exchange(mine)).sum(0)
    output.copy_(total.chunk(group.size())[group.rank()].view_as(output))


def _all_to_all(output: Tensor, mine: Tensor, group: Any = None) -> None:
    parts = [part.chunk(group.size())[group.rank()] for part in group.exchange(mine)]
    output.copy_(torch.cat(parts).view_as(output))


def _of_all(call: Callable[..., None], meeting: _Meeting, *arguments: Any, group: Any = None, **options: Any) -> None:
    """`call` by a group, or by all ranks."""
    call(*arguments, group=group or meeting, **options)


_CALLS = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all,
}


def on_axis(fn: Callable[[AxisGroup], T], size: int) -> list[T]:
    """`fn(axis)` on each of `size` ranks of an axis; results in rank order. One rank has no group, as in a run."""
    if size == 1:
        return [fn(SINGLE)]
    meeting = _Meeting(size)

    def body(rank: int) -> T:
        meeting.join(rank)
        group = cast(dist.ProcessGroup, meeting)
        try:
            return fn(AxisGroup(rank=rank, size=size, ranks=tuple(range(size)), group=group))
        except BaseException:
            meeting.abort()
            raise

    with ExitStack() as stack:
        for name, call in _CALLS.items():
            stack.enter_context(patch.object(dist, name, partial(_of_all, call, meeting)))
        stack.enter_context(patch.object(dist, "get_world_size", lambda group=None: (group or meeting).size()))
        stack.enter_context(patch.object(collectives, "resolve", {meeting.group_name: meeting}.__getitem__))
        pool = stack.enter_context(ThreadPoolExecutor(size))
        futures = [pool.submit(body, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        # A broken meeting is what the other ranks see of the one that failed.
        if not isinstance(error, threading.BrokenBarrierError) or error is errors[-1]:
            raise error
    return [future.result() for future in futures]


def context_of(tp: AxisGroup = SINGLE, cp: AxisGroup = SINGLE) -> ParallelContext:
    """The context of a rank on `tp` or on `cp` whose other axes have one rank."""
    return replace(
        ParallelContext.single(),
        grid=Grid(tp=tp.size, cp=cp.size),
        rank=tp.rank + cp.rank,
        coord=Coord(pp=0, dp=0, cp=cp.rank, tp=tp.rank),
        tp=tp,
        cp=cp,
        replica=tp,
        reduce=cp,
    )
