"""Inputs of recomputed groups in host memory between forward and backward pass.

Copies run on a stream of their own: out beside the rest of the forward pass, back one group ahead of the backward pass.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class HostCheckpoints:
    """Moves what autograd keeps into reused host buffers. One for all passes of a rank; on CPUs it copies plainly."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.device, int], list[_Buffer]] = defaultdict(list)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def forward_pass(self) -> _Pass:
        """For one forward pass of one micro-batch through consecutive groups."""
        return _Pass(self)

    @property
    def buffer_bytes(self) -> int:
        """Of the buffers that wait for their next use."""
        return sum(size * len(buffers) for (_, size), buffers in self._free.items())

    def take(self, like: Tensor) -> _Buffer:
        """A buffer for the elements of `like`."""
        size = like.numel() * like.element_size()
        waiting = self._free[like.device, size]
        return waiting.pop() if waiting else _Buffer(size, like.device)

    def give_back(self, buffer: _Buffer) -> None:
        """For the next `take`, whose copy comes later on the same stream."""
        self._free[buffer.device, buffer.bytes.numel()].append(buffer)

    def beside(self, device: torch.device) -> AbstractContextManager[object]:
        """Copies inside run after all work so far of the current stream of `device`, and beside what comes."""
        if device.type != "cuda":
            return nullcontext()
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)


class _Buffer:
    """Host memory, page-locked where a GPU copies from it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.bytes = torch.empty(size, dtype=torch.uint8)
        if device.type == "cuda" and size:
            # torch's own page-locked memory comes in powers of two.
            runtime, address = torch.cuda.cudart(), self.bytes.data_ptr()
            torch.cuda.check_error(runtime.cudaHostRegister(address, size, 0))
            weakref.finalize(self, _unlock, self.bytes).atexit = False

    def shaped(self, like: torch.Size, dtype: torch.dtype) -> Tensor:
        return self.bytes.view(dtype).view(like)


def _unlock(memory: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


class _Saved:
    """One tensor in host memory, and what was saved before it: the backward pass asks for that next."""

    _buffer: _Buffer | None = None

    def __init__(self, owner: HostCheckpoints, tensor: Tensor, before: _Saved | None) -> None:
        self._owner, self.before = owner, before
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._buffer = owner.take(tensor)
        self._back: tuple[Tensor, torch.cuda.Event | None] | None = None
        with owner.beside(tensor.device):
            self._buffer.shaped(self._shape, self._dtype).copy_(tensor, non_blocking=True)
        if tensor.is_cuda:
            # Its memory is free for others once the copy has read it.
            tensor.record_stream(owner._streams[tensor.device])

    def fetch(self) -> None:
        """Start the copy back, unless it is under way or was taken."""
        if self._buffer is None:
            return
        # Memory of the stream that uses it; what that stream did with it before, the copy waits for.
        tensor, event = torch.empty(self._shape, dtype=self._dtype, device=self._device), None
        with self._owner.beside(self._device):
            tensor.copy_(self._buffer.shaped(self._shape, self._dtype), non_blocking=True)
            if tensor.is_cuda:
                event = torch.cuda.Event()
                event.record()
        self._back = tensor, event
        self._owner.give_back(self._buffer)
        self._buffer = None

    def take(self) -> Tensor:
        """The tensor on its device. Once."""
        self.fetch()
        if self._back is None:
            raise RuntimeError("a checkpoint in host memory serves one backward pass of each forward pass")
        (tensor, event), self._back = self._back, None
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        before, self.before = self.before, None
        if before is not None:
            before.fetch()
        return tensor

    def __del__(self) -> None:
        # Of a pass without a backward pass.
        if self._buffer is not None:
            self._owner.give_back(self._buffer)


class _Pass:
    """`saved_tensors_hooks` for the checkpoints of one forward pass."""

    def __init__(self, owner: HostCheckpoints) -> None:
        self._owner = owner
        self._last: _Saved | None = None

    def __call__(self) -> AbstractContextManager[object]:
        """What autograd keeps inside goes to host memory."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _Saved.take)

    def _pack(self, tensor: Tensor) -> _Saved:
        self._last = _Saved(self._owner, tensor.detach(), self._last)
        return self._last
