"""Times of all-reduces of all ranks, and of messages between two of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from engine.study.network_judge import Link

SIZES = {"cpu": (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20), "cuda": (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20, 2**28)}
"""Bytes of the all-reduces by default."""
LINK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Bytes of the message that gives a link's bandwidth."""
_WARM_UP, _REPEATS = 2, 5


@dataclass(frozen=True, slots=True)
class AllReduce:
    """Seconds of an all-reduce of `size` bytes on each rank, the median of several."""

    size: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second: the buffer over the time ("algbw" of nccl-tests)."""
        return self.size / self.seconds

    def bus_bandwidth(self, world: int) -> float:
        """Bytes per second of the slowest wire, 2(n-1)/n times as many ("busbw" of nccl-tests, PERFORMANCE.md)."""
        return self.bandwidth * 2 * (world - 1) / world


def pairs_of(world: int, which: str) -> list[tuple[int, int]]:
    """Pairs of ranks: a ring of neighbours, or `all`."""
    if which == "all":
        return [(first, second) for first in range(world) for second in range(first + 1, world)]
    return sorted({(min(rank, (rank + 1) % world), max(rank, (rank + 1) % world)) for rank in range(world)})


def all_reduce(size: int, device: torch.device) -> AllReduce:
    """Measure an all-reduce of `size` bytes of fp32. Collective; all ranks return the slowest rank's time."""
    buffer = torch.zeros(max(1, size // 4), dtype=torch.float32, device=device)
    seconds = torch.tensor([_time(lambda: dist.all_reduce(buffer), device)], dtype=torch.float64, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return AllReduce(buffer.numel() * 4, float(seconds))


def links(pairs: Sequence[tuple[int, int]], size: int, device: torch.device) -> list[Link]:
    """Measure one pair after the other, while the others wait, with messages there and back. Collective.

    Latency is that of 4 bytes, bandwidth that of `size` bytes; both are half of there and back.
    """
    rank, found = dist.get_rank(), []
    for first, second in pairs:
        times = torch.zeros(2, dtype=torch.float64, device=device)
        if rank in (first, second):
            for index, bytes_ in enumerate((4, size)):
                times[index] = _ping(rank == first, second if rank == first else first, bytes_, device) / 2
        # The two have measured the same trip; the slower clock counts. This is also where the others wait.
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        latency, large = times.tolist()
        found.append(Link((first, second), latency, size / large))
    return found


def _ping(begins: bool, other: int, size: int, device: torch.device) -> float:
    """Seconds of a message to `other` and back."""
    buffer = torch.zeros(max(1, size // 4), dtype=torch.float32, device=device)

    def there_and_back() -> None:
        for sends in (begins, not begins):
            if sends:
                dist.send(buffer, other)
            else:
                dist.recv(buffer, other)

    return _time(there_and_back, device)


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of `work`, warmed up."""
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        _finish(device)
        start = time.perf_counter()
        work()
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[_WARM_UP:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
