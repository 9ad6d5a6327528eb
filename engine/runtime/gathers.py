"""New weights on their way to all ranks beside the forward pass that uses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn

_AHEAD = 2
"""Layers whose weights are under way while one computes."""


class Gathers:
    """A flat tensor of weights, of which each rank has stepped a partition, sent around from its beginning on.

    A layer waits for what it computes with and no more, as with Megatron's overlapped gathers. Stretches are sent in
    one order, those of a layer two layers ahead and not at once: where a device takes all work from one queue, as with
    tensor parallelism (`CUDA_DEVICE_MAX_CONNECTIONS`), kernels wait behind all messages that were launched before them.
    Until a layer was waited for, nobody may read or write its weights.

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
        needed = [{stretch_of.get(id(parameter), -1) for parameter in layer} for layer in layers]
        # The number of stretches that have to be there before each layer computes.
        self._needs = [1 + max(stretches, default=-1) for stretches in needed]
        self._under_way: deque[list[dist.Work]] = deque()
        self._sent = self._done = len(self._stretches)

    def begin(self) -> None:
        """Send what this rank has stepped, and receive the rest. Collective."""
        assert self._done == len(self._stretches)
        self._sent = self._done = 0
        self._send(max(self._needs[:_AHEAD], default=0))

    def wait_for(self, layer: int) -> None:
        """Before `layer` computes: let the current stream, or on a CPU the host, wait for its weights. Collective."""
        self._send(max(self._needs[layer : layer + _AHEAD + 1]))
        self._wait(self._needs[layer])

    def finish(self) -> None:
        """Wait for all. Collective."""
        self._send(len(self._stretches))
        self._wait(len(self._stretches))

    @property
    def left(self) -> int:
        """Stretches that nobody has waited for."""
        return len(self._stretches) - self._done

    def _send(self, until: int) -> None:
        while self._sent < until:
            parts = self._parts(*self._stretches[self._sent])
            self._under_way.append([self._message(part, rank) for part, rank in parts])
            self._sent += 1

    def _wait(self, until: int) -> None:
        while self._done < until:
            for work in self._under_way.popleft():
                work.wait()
            self._done += 1

    def _message(self, part: Tensor, rank: int) -> dist.Work:
        work = dist.broadcast(part, rank, group=self._group, async_op=True)
        assert work is not None
        return work

    def _parts(self, start: int, end: int) -> Iterator[tuple[Tensor, int]]:
        """The parts of a stretch, and who has stepped them."""
        size = self._flat.numel() // len(self._ranks)
        for place, rank in enumerate(self._ranks):
            low, high = max(start, place * size), min(end, (place + 1) * size)
            if low < high:
                yield self._flat[low:high], rank
