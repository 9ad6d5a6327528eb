"""A tensor-parallel axis of threads: the real layers and their collectives, without processes or a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import SINGLE, AxisGroup, ParallelContext
from engine.topology.grid import Coord, Grid

T = TypeVar("T")
_TIMEOUT_S = 30.0


class _Meeting:
    """Stands for a process group: ranks lay down a tensor each, and take the reduction of all."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=_TIMEOUT_S)
        self._parts: dict[int, Tensor] = {}

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        group._parts[threading.get_ident()] = tensor.detach().clone()
        self._barrier.wait()
        parts = torch.stack(list(group._parts.values()))
        tensor.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))
        self._barrier.wait()

    def abort(self) -> None:
        self._barrier.abort()


def on_tp_ranks(fn: Callable[[AxisGroup], T], size: int) -> list[T]:
    """`fn(axis)` on each of `size` tensor-parallel ranks; results in rank order. One rank has no group, as in a run."""
    if size == 1:
        return [fn(SINGLE)]
    meeting = _Meeting(size)

    def body(rank: int) -> T:
        group = cast(dist.ProcessGroup, meeting)
        try:
            return fn(AxisGroup(rank=rank, size=size, ranks=tuple(range(size)), group=group))
        except BaseException:
            meeting.abort()
            raise

    with patch.object(dist, "all_reduce", meeting.all_reduce), ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(body, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        # A broken meeting is what the other ranks see of the one that failed.
        if not isinstance(error, threading.BrokenBarrierError) or error is errors[-1]:
            raise error
    return [future.result() for future in futures]


def context_of(tp: AxisGroup) -> ParallelContext:
    """The context of a rank on `tp` whose other axes have one rank."""
    return replace(
        ParallelContext.single(),
        grid=Grid(tp=tp.size),
        rank=tp.rank,
        coord=Coord(pp=0, dp=0, tp=tp.rank),
        tp=tp,
        replica=tp,
    )
