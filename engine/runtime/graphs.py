"""Passes of one shape as CUDA graphs: the host launches all kernels of a micro-batch at once, and not one by one.

A graph repeats the kernels that it was recorded with, on the same addresses and with the same numbers. So a pass reads
copies of its feed that stay where they are, and `engine.config.rules_kernels` refuses what the host would decide anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.config.enums import Switch
from engine.config.rules_kernels import obstacles
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.feed import Feed

EAGER = 2
"""Passes of each kind before it is recorded: they compile, choose kernels, and make what is made once.

The trials of `train.micro_batch=auto` have three steps, and so see what the recording takes.
"""

Work = Callable[[], None]
Flags = tuple[tuple[bool, ...], ...]


def wants_graphs(cfg: Config, ctx: ParallelContext) -> bool:
    """Whether passes are recorded. `auto`: on GPUs, where no rule stands in the way."""
    if cfg.kernels.cuda_graphs is Switch.auto:
        return ctx.device.type == "cuda" and not obstacles(cfg, ctx.dp.size)
    return cfg.kernels.cuda_graphs is Switch.on


class Recorder(Protocol):
    """Who runs the host's side of a pass, and who records it."""

    def run(self, work: Work) -> None:
        """Do `work` now."""

    def record(self, work: Work) -> Work:
        """What does on the device what `work` does there; until it is called, nothing is done."""


class CudaRecorder:
    """All on one side stream, which passes that are not recorded use too.

    Nodes that add up gradients and workspaces of cuBLAS belong to the stream that first met them: one that was left on
    another stream would end a recording. All graphs share one pool, as none of them runs while another does.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        """As `Recorder`; what follows on the current stream waits for it."""
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            work()
        outside.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """As `Recorder`. Gives what the allocator has cached back to the device first."""
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: one pins memory for the next batches, one watches over collectives.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class Repeater:
    """For CPUs, which have no graphs: the work is done again, with all else as if it had been recorded."""

    def run(self, work: Work) -> None:
        """As `Recorder`."""
        work()

    def record(self, work: Work) -> Work:
        """As `Recorder`."""
        return work


@dataclass(slots=True)
class _Kind:
    """Passes that begin with the same flags: they copy the same gradients and add the others."""

    eager: int = 0
    after: Flags = ()
    replay: Work | None = None


class GraphedPasses:
    """Calls `run(feed)`, or replays what it did with a feed of the same signature.

    The first passes set the signature; once something is recorded, feeds of another one run as they are.

    Args:
        run: forward and backward pass of a micro-batch; gives its share of the loss, detached, scalar fp32.
        flags: of each parameter in each group, whether its sum holds a gradient already; `run` reads and sets them.
    """

    def __init__(self, run: Callable[[Feed], Tensor], flags: list[list[bool]], recorder: Recorder) -> None:
        self._run, self._flags, self._recorder = run, flags, recorder
        self._feed: Feed | None = None
        self._share = torch.zeros(())
        self._kinds: dict[Flags, _Kind] = {}
        self.replays = 0

    def __call__(self, feed: Feed) -> Tensor:
        """The share of `feed`, which the next call overwrites."""
        if self._feed is None or _signature(feed) != _signature(self._feed):
            if any(kind.replay for kind in self._kinds.values()):
                self._recorder.run(partial(self._once, feed))
                return self._share
            self._feed, self._kinds = _cloned(feed), {}
            self._share = torch.zeros((), device=feed.targets.device)
        _copy(feed, self._feed)
        kind = self._kinds.setdefault(self._state(), _Kind())
        if kind.replay is None and not self._is_due(kind):
            self._recorder.run(partial(self._once, self._feed))
            kind.eager, kind.after = kind.eager + 1, self._state()
            return self._share
        if kind.replay is None:
            kind.replay = self._recorder.record(partial(self._once, self._feed))
        kind.replay()
        for flags, after in zip(self._flags, kind.after, strict=True):
            flags[:] = after
        self.replays += 1
        return self._share

    def _once(self, feed: Feed) -> None:
        self._share.copy_(self._run(feed))

    def _state(self) -> Flags:
        return tuple(map(tuple, self._flags))

    def _is_due(self, kind: _Kind) -> bool:
        """Also the kind that begins a step, and by then all that belong to every step.

        A pass that is not recorded would otherwise hold its activations beside the pool of those that are.
        """
        first = next(iter(self._kinds.values()))
        return min(kind.eager, first.eager) >= EAGER


def _tensors(feed: Feed) -> dict[str, Tensor]:
    """The fields that a pass reads on the device."""
    values = {field.name: getattr(feed, field.name) for field in fields(Feed)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _cloned(feed: Feed) -> Feed:
    clones: dict[str, Any] = {name: value.clone() for name, value in _tensors(feed).items()}
    return replace(feed, **clones)


def _copy(feed: Feed, to: Feed) -> None:
    for name, value in _tensors(feed).items():
        getattr(to, name).copy_(value, non_blocking=True)


def _signature(feed: Feed) -> list[Any]:
    """What a graph holds of a feed: sizes, dtypes and numbers of the host, less the seed that the rules leave unused.

    That of documents is equal to no other.
    """
    held: list[Any] = [(name, value.shape, value.dtype) for name, value in _tensors(feed).items()]
    return [*held, feed.whole_length, feed.seed, feed.documents and object()]
