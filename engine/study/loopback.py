"""A process group of which the first rank alone exists.

All other ranks have always come already, with what is as large as this rank's own: an all-gather repeats it, a sum is
as large as that of so many independent terms, and what a neighbour would send is noise. So gradients neither grow nor
vanish with the layers. Among copies of one rank sums would all go in one direction, and gradients become infinite, with
which a GPU has less work and draws less power. On a GPU a message takes the time that the link would, on a few
multiprocessors; on a CPU it is a copy.

So what the rank holds is that of a run of all ranks, and so is its own work beside its messages. Missing is that others
are waited for, and what NCCL takes to begin a message; and weights are not those of any training.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_process_group_name

from engine.dist.init import LOOPBACK

_ProcessGroup: Any = dist.ProcessGroup
"""Its stubs say what may be called in C++, not what a group in Python has."""


class Wire(Protocol):
    """Moves dense 1-D tensors, on the current stream. See `engine_kernels.triton.link.Link`."""

    def gather(self, own: Tensor, target: Tensor, rank: int) -> None: ...

    def reduce_scatter(self, source: Tensor, target: Tensor, rank: int, factor: float) -> None: ...

    def scale(self, x: Tensor, factor: float) -> None: ...


class Copies:
    """The wire of a CPU."""

    def gather(self, own: Tensor, target: Tensor, rank: int) -> None:
        """(n,) and (ranks * n,): `own` as each rank's part of `target`."""
        for start in range(0, target.numel(), max(1, own.numel())):
            part = target[start : start + own.numel()]
            if part.data_ptr() != own.data_ptr():
                part.copy_(own)

    def reduce_scatter(self, source: Tensor, target: Tensor, rank: int, factor: float) -> None:
        """(ranks * n,) and (n,): `target` is the part of `rank` times `factor`."""
        count = target.numel()
        target.copy_(source[rank * count : (rank + 1) * count] * factor)

    def scale(self, x: Tensor, factor: float) -> None:
        """(n,): `x` times `factor`, in place."""
        x.mul_(factor)


_COPIES = Copies()


@dataclass(slots=True)
class Sent:
    """Messages of a kind: how many, and bytes that this rank sends for them around a ring."""

    count: int = 0
    bytes: float = 0.0


sent: defaultdict[str, Sent] = defaultdict(Sent)
"""All messages of tensors so far, by their kind."""


def join(world_size: int, wire: Wire) -> None:
    """Make the default process group, of `world_size` ranks of which this is the first. Once in a process."""

    def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Loopback:
        return Loopback(rank, size, wire)

    dist.Backend.register_backend(LOOPBACK, create, devices=["cpu", "cuda"])
    dist.init_process_group(LOOPBACK, store=dist.HashStore(), rank=0, world_size=world_size)


class _Message(dist.Work):
    """A message under way. It holds its tensors until it is waited for, as NCCL does."""

    def __init__(self, tensors: Sequence[Tensor], done: torch.cuda.Event | None) -> None:
        super().__init__()
        self._tensors, self._done = list(tensors), done

    def wait(self, timeout: timedelta | None = None) -> bool:
        """The current stream waits, the host does not."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
        self._tensors.clear()
        return True

    def is_completed(self) -> bool:
        return self._done is None or self._done.query()

    def synchronize(self) -> None:
        self.wait()


class Loopback(_ProcessGroup):
    """A group that `join` or `dist.new_group` makes. Its messages run on streams of its own, but for those waited for.

    torch 2.11 and 2.13 have different names for three of the methods.
    """

    def __init__(self, rank: int, size: int, wire: Wire) -> None:
        super().__init__(rank, size)
        self._place, self._ranks, self._wire = rank, size, wire
        # What arrives takes the other direction of the link.
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._noise: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def getBackendName(self) -> str:  # noqa: N802 -- its name there
        return LOOPBACK

    @property
    def group_name(self) -> str:
        """Compiled graphs find the group by it."""
        return str(_get_process_group_name(self))

    def __repr__(self) -> str:
        return f"Loopback(rank {self._place} of {self._ranks})"

    def all_gather_single(self, output: Tensor, own: Tensor, opts: Any = None) -> dist.Work:
        """(n,) -> (ranks * n,)."""
        return self._run(
            "all-gather",
            (self._ranks - 1) * own.nbytes,
            (own, output),
            lambda: self._wire_of(own).gather(own.view(-1), output.view(-1), self._place),
            opts,
        )

    _allgather_base = all_gather_single

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any) -> dist.Work:
        """(ranks * n,) -> (n,)."""
        return self._run(
            "reduce-scatter",
            (self._ranks - 1) * output.nbytes,
            (source, output),
            lambda: self._wire_of(source).reduce_scatter(
                source.view(-1), output.view(-1), self._place, self._factor(source, opts.reduceOp)
            ),
            opts,
        )

    _reduce_scatter_base = reduce_scatter_single

    def all_to_all_single(
        self, output: Tensor, source: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> dist.Work:
        """Each other rank sends what this one has for itself; as much of it as the splits ask for."""

        def move() -> None:
            sizes = input_splits or [source.shape[0] // self._ranks] * self._ranks
            own = source.split(sizes)[self._place]
            wanted = output_splits or [output.shape[0] // self._ranks] * self._ranks
            for part, size in zip(output.split(wanted), wanted, strict=True):
                part[: own.shape[0]].copy_(own[:size])
            self._wire_of(output).scale(output.view(-1), 1)

        share = source.nbytes * (self._ranks - 1) / self._ranks
        return self._run("all-to-all", share, (source, output), move, opts)

    alltoall_base = all_to_all_single

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """In place."""
        (whole,) = tensors
        factor = self._factor(whole, dist.ReduceOp.SUM if opts is None else opts.reduceOp)

        def move() -> None:
            flat, wire = whole.view(-1), self._wire_of(whole)
            wire.scale(flat, factor)
            # Around a ring each element goes 2 (ranks - 1) / ranks times.
            wire.scale(flat[: flat.numel() * (self._ranks - 2) // self._ranks], 1)

        return self._run("all-reduce", 2 * (self._ranks - 1) / self._ranks * whole.nbytes, (whole,), move, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        """In place, at the root alone."""
        (whole,) = tensors
        factor = self._factor(whole, opts.reduceOp) if opts.rootRank == self._place else 1
        return self._pass_on("reduce", whole, factor, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """The root has what this rank has."""
        (whole,) = tensors
        return self._pass_on("broadcast", whole, 1, opts)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        (whole,) = tensors
        return self._pass_on("send", whole, 1, None)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> dist.Work:
        """Normal noise; zeros of integers. What arrives is not among the bytes sent."""
        (whole,) = tensors

        def move() -> None:
            key = whole.dtype, whole.device
            if key not in self._noise or self._noise[key].numel() < whole.numel():
                noise = torch.zeros(whole.numel(), dtype=whole.dtype, device=whole.device)
                self._noise[key] = noise.normal_() if whole.dtype.is_floating_point else noise
            whole.view(-1).copy_(self._noise[key][: whole.numel()])
            self._wire_of(whole).scale(whole.view(-1), 1)

        return self._run("receive", 0, (whole,), move, None)

    def allgather(self, outputs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """Lists. Those of integers are objects, and not counted."""
        (own,), every = tensors, outputs[0]

        def move() -> None:
            for one in every:
                one.copy_(own)
                self._wire_of(one).scale(one.view(-1), 1)

        if not own.is_floating_point():
            for one in every:
                one.copy_(own)
            return _Message((), None)
        return self._run("all-gather", (self._ranks - 1) * own.nbytes, (own, *every), move, opts)

    def gather(self, outputs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """Lists, at the root alone."""
        for one in outputs[0] if outputs else ():
            one.copy_(tensors[0])
        return _Message((), None)

    def barrier(self, opts: Any = None) -> dist.Work:
        return _Message((), None)

    def _pass_on(self, kind: str, whole: Tensor, factor: float, opts: Any) -> dist.Work:
        wire = self._wire_of(whole)
        return self._run(kind, whole.nbytes, (whole,), lambda: wire.scale(whole.view(-1), factor), opts)

    def _wire_of(self, x: Tensor) -> Wire:
        """Tensors in host memory are copied there, also on a GPU's rank."""
        return self._wire if x.is_cuda else _COPIES

    def _factor(self, x: Tensor, operation: Any) -> float:
        """What a reduction makes of `x`: the sum of independent values as large, of counts that of equal ones."""
        if operation != dist.ReduceOp.SUM:
            return 1
        return math.sqrt(self._ranks) if x.is_floating_point() else self._ranks

    def _run(self, kind: str, size: float, tensors: Sequence[Tensor], move: Callable[[], None], opts: Any) -> dist.Work:
        """Launch `move`: on the current stream where the caller waits anyway, as NCCL does, else beside it."""
        sent[kind].count += 1
        sent[kind].bytes += size
        if not tensors[0].is_cuda or not getattr(opts, "asyncOp", True):
            move()
            return _Message((), None)
        way = "in" if kind == "receive" else "out"
        if way not in self._streams:
            self._streams[way] = torch.cuda.Stream(tensors[0].device)
        stream = self._streams[way]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            move()
            done = torch.cuda.Event()
            done.record()
        return _Message(tensors, done)
