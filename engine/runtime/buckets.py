"""Reduction of flat gradients beside the backward pass that makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.init import has_nccl


def averages_well(dtype: torch.dtype, group: dist.ProcessGroup) -> bool:
    """Whether the backend of `group` averages itself, and rightly: NCCL multiplies by 1 / ranks, rounded to the dtype.

    For three ranks and bf16 that would be 0.2 % too much.
    """
    ranks = group.size()
    return has_nccl(group) and (dtype is torch.float32 or ranks & (ranks - 1) == 0)


class Buckets:
    """A flat tensor of gradients, reduced from its end on as soon as the last parameters have theirs.

    A bucket's stretch of each rank's partition goes to that rank alone. All ranks reduce bucket after bucket in the
    same order, whatever the order in which gradients come.

    Args:
        flat: (n,), of equal partitions, one for each rank of `group`.
        sizes: elements of the parameters in it, in their order; what is left is padding.
        elements: a bucket has at least as many, but for the first of the tensor.
        average: whether the backend divides by the number of ranks; else partitions hold sums.
    """

    def __init__(
        self, flat: Tensor, sizes: Sequence[int], group: dist.ProcessGroup, elements: int, *, average: bool
    ) -> None:
        self._flat, self._group = flat, group
        self._ranks = dist.get_process_group_ranks(group)
        self._operation = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
        self._stretches: list[tuple[int, int]] = []
        self._bucket_of = [0] * len(sizes)
        end, start, members = flat.numel(), sum(sizes), list[int]()
        for index in reversed(range(len(sizes))):
            start -= sizes[index]
            members.append(index)
            if end - start >= elements or index == 0:
                for member in members:
                    self._bucket_of[member] = len(self._stretches)
                self._stretches.append((start, end))
                end, members = start, []
        self._left = [0] * len(self._stretches)
        self._works: list[dist.Work] = []
        self._begin()

    def _begin(self) -> None:
        self._next = 0
        for bucket in range(len(self._left)):
            self._left[bucket] = self._bucket_of.count(bucket)

    def complete(self, index: int) -> None:
        """Parameter `index` has its whole gradient of this step, on this rank."""
        self._left[self._bucket_of[index]] -= 1
        while self._next < len(self._left) and self._left[self._next] == 0:
            self._reduce(*self._stretches[self._next])
            self._next += 1

    def finish(self) -> None:
        """Reduce the rest, wait for all, and begin anew."""
        for start, end in self._stretches[self._next :]:
            self._reduce(start, end)
        for work in self._works:
            work.wait()
        self._works.clear()
        self._begin()

    def _reduce(self, start: int, end: int) -> None:
        size = self._flat.numel() // len(self._ranks)
        for place, rank in enumerate(self._ranks):
            low, high = max(start, place * size), min(end, (place + 1) * size)
            if low < high:
                part = self._flat[low:high]
                work = dist.reduce(part, rank, op=self._operation, group=self._group, async_op=True)
                assert work is not None
                self._works.append(work)
