"""New weights on their way to all ranks beside the forward pass that uses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn


class Gathers:
    """A flat tensor of weights, of which each rank has stepped a partition, sent around from its beginning on.

    A layer waits for what it computes with and no more, as with Megatron's overlapped gathers. Ranks send stretch after
    stretch in one order. Until a layer was waited for, nobody may read or write its weights.

    Args:
        flat: (n,), of equal partitions, one for each rank of `group`.
        parameters: those in it, in their order; what is left is padding.
        layers: parameters of each layer, in the order of the forward pass, also of such that are not in `flat`.
        elements: a stretch has at least as many, but for the last.
    """

    def __init__(
        self,
        flat: Tensor,
        parameters: Sequence[nn.Parameter],
        layers: Iterable[Iterable[nn.Parameter]],
        group: dist.ProcessGroup,
        elements: int = 2**26,
    ) -> None:
        self._flat, self._group = flat, group
        self._ranks = dist.get_process_group_ranks(group)
        self._stretches: list[tuple[int, int]] = []
        stretch_of, start, end = dict[int, int](), 0, 0
        for parameter in parameters:
            stretch_of[id(parameter)] = len(self._stretches)
            end += parameter.numel()
            if end - start >= elements or parameter is parameters[-1]:
                self._stretches.append((start, end))
                start = end
        self._last = [max((stretch_of.get(id(parameter), -1) for parameter in layer), default=-1) for layer in layers]
        self._under_way: deque[tuple[int, dist.Work]] = deque()

    def begin(self) -> None:
        """Send what this rank has stepped, and receive the rest. Collective."""
        assert not self._under_way
        for number, stretch in enumerate(self._stretches):
            for part, rank in self._parts(*stretch):
                work = dist.broadcast(part, rank, group=self._group, async_op=True)
                assert work is not None
                self._under_way.append((number, work))

    def wait_for(self, layer: int) -> None:
        """Before `layer` computes: let the current stream, or on a CPU the host, wait for its weights."""
        while self._under_way and self._under_way[0][0] <= self._last[layer]:
            self._under_way.popleft()[1].wait()

    def finish(self) -> None:
        """Wait for all."""
        while self._under_way:
            self._under_way.popleft()[1].wait()

    def _parts(self, start: int, end: int) -> Iterator[tuple[Tensor, int]]:
        """The parts of a stretch, and who has stepped them."""
        size = self._flat.numel() // len(self._ranks)
        for place, rank in enumerate(self._ranks):
            low, high = max(start, place * size), min(end, (place + 1) * size)
            if low < high:
                yield self._flat[low:high], rank
