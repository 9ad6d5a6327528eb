"""Optimizer state in host memory: chunk by chunk, gradients come, the host steps, and new weights go back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.optim.flat_adamw import FlatAdamW

_SLOTS = 4
"""Chunks under way without delay: one that comes, one that waits, one at the step, one that leaves."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one parameter group has in host memory."""

    group: dict[str, Any]
    state: Tensor
    """(n,), in host memory: the weights that `FlatAdamW` steps, fp32 or bf16."""
    gradient: Tensor
    """(n,), on the device, fp32 or bf16."""
    weights: Tensor
    """(n,), on the device, bf16: those of the model."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    part: Part
    start: int
    stop: int


@dataclass(slots=True)
class _Slot:
    """Host memory of a chunk on its way: fp32 gradients, and in their place the bf16 weights that come of them."""

    memory: Tensor
    arrived: _Mark | None = None
    left: _Mark | None = None

    def gradient(self, size: int) -> Tensor:
        return self.memory[:size]

    def weights(self, size: int) -> Tensor:
        return self.memory.view(torch.bfloat16)[:size]


class _Mark:
    """A place in a stream that a host can wait for; on a CPU all is done at once."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.event = None if stream is None else stream.record_event()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


@dataclass(slots=True)
class _Lane:
    """Copies in one direction, beside the device's other work."""

    device: torch.device
    stream: torch.cuda.Stream | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)

    def follow(self) -> None:
        """Wait for what the current stream was given so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, source: Tensor, target: Tensor, factor: Tensor | None = None) -> _Mark:
        """`source`, times `factor` in fp32, into `target`."""
        with torch.cuda.stream(self.stream):  # type: ignore[arg-type]
            # Its memory belongs to this stream, so it may be given back before the copy is done.
            value = source if factor is None else source.to(torch.float32, copy=True).mul_(factor)
            target.copy_(value, non_blocking=True)
        return _Mark(self.stream)


@dataclass(frozen=True, slots=True)
class Streamed:
    """How state is streamed."""

    share: float
    """Of each partition: what lives in host memory."""
    delayed: bool = False
    """Whether a step goes on beside the next step's passes. Its weights are kept back until then, and all gradients
    have host memory, 4 bytes each."""
    pin: bool = True
    """Page-locked memory for what travels to and from a GPU."""
    chunk: int = 2**25
    """Elements that travel at a time: 128 MiB in fp32."""


class HostStep:
    """Steps `parts` with `optimizer` in a thread of its own, which has as many cores as the one that makes it.

    A step is finished before its weights are used: at once without delay, and before the next one is begun.
    """

    def __init__(self, optimizer: FlatAdamW, parts: Sequence[Part], device: torch.device, streamed: Streamed) -> None:
        self._optimizer, self.parts, self._device, self.delayed = optimizer, parts, device, streamed.delayed
        chunk = streamed.chunk
        self._chunks = [
            _Chunk(part, start, min(start + chunk, part.state.numel()))
            for part in parts
            for start in range(0, part.state.numel(), chunk)
        ]
        sizes = [one.stop - one.start for one in self._chunks]
        if not self.delayed:
            sizes = [max(sizes, default=0)] * min(_SLOTS, len(sizes))
        pin, threads = streamed.pin and device.type == "cuda", torch.get_num_threads()
        self._slots = [_Slot(torch.empty(size, pin_memory=pin)) for size in sizes]
        self._factor = torch.empty((), pin_memory=pin)
        self._in, self._out = _Lane(device), _Lane(device)
        self._pool = ThreadPoolExecutor(1, "host-step", initializer=_use_threads, initargs=(threads, device))
        self._under_way: Future[bool] | None = None
        self._gradients_left: _Mark | None = None

    def begin(self, factor: Tensor) -> None:
        """Start the step with gradients times `factor` (fp32, on the device; NaN drops it), and return at once."""
        assert self._under_way is None
        options = [{**part.group} for part in self.parts]
        steps = [self._optimizer.count(part.state) for part in self.parts]
        self._in.follow()
        known = self._in.copy(factor, self._factor)
        if self.delayed:
            for index in range(len(self._chunks)):
                self._fetch(index, factor)
            self._gradients_left = _Mark(self._in.stream)
        named = {id(part): (option, step) for part, option, step in zip(self.parts, options, steps, strict=True)}
        self._under_way = self._pool.submit(partial(self._step, factor, known, named))

    def release_gradients(self) -> None:
        """Before the first new gradient is written: the device waits until those of the step under way have left."""
        if self._gradients_left is not None and self._gradients_left.event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._gradients_left.event)
        self._gradients_left = None

    def finish(self) -> bool:
        """Wait for the step under way; the model has its weights from then on. Returns whether they came late."""
        if self._under_way is None:
            return False
        done, self._under_way = self._under_way.result(), None
        if done and self.delayed:
            for chunk, slot in zip(self._chunks, self._slots, strict=True):
                new = slot.weights(chunk.stop - chunk.start)
                chunk.part.weights[chunk.start : chunk.stop].copy_(new, non_blocking=True)
        elif self._out.stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._out.stream)
        return done and self.delayed

    @torch.no_grad()
    def _step(self, factor: Tensor, known: _Mark, named: Mapping[int, tuple[dict[str, Any], int]]) -> bool:
        """All chunks. Returns whether the step was made."""
        known.wait()
        if not bool(self._factor.isfinite()):
            return False
        ahead = len(self._chunks) if self.delayed else _SLOTS // 2
        for index in range(0 if self.delayed else min(ahead, len(self._chunks))):
            self._fetch(index, factor)
        for index, chunk in enumerate(self._chunks):
            if index + ahead < len(self._chunks):
                self._fetch(index + ahead, factor)
            slot, size = self._slots[index % len(self._slots)], chunk.stop - chunk.start
            assert slot.arrived is not None
            slot.arrived.wait()
            options, step = named[id(chunk.part)]
            self._optimizer.update_on_host(options, chunk.part.state, slot.gradient(size), chunk.start, step)
            slot.weights(size).copy_(chunk.part.state[chunk.start : chunk.stop])
            if not self.delayed:
                slot.left = self._out.copy(slot.weights(size), chunk.part.weights[chunk.start : chunk.stop])
        return True

    def _fetch(self, index: int, factor: Tensor) -> None:
        chunk, slot = self._chunks[index], self._slots[index % len(self._slots)]
        if slot.left is not None:
            slot.left.wait()
        source = chunk.part.gradient[chunk.start : chunk.stop]
        slot.arrived = self._in.copy(source, slot.gradient(chunk.stop - chunk.start), factor)


def _use_threads(threads: int, device: torch.device) -> None:
    """For the thread of the steps."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
