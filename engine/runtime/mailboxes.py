"""Messages between the stages of a pipeline through memory that the GPUs of a host map of each other.

A copy engine writes each message into a box of the receiver, which need not have asked for it. NCCL's sends and
receives are kernels: each occupies multiprocessors from its start until the other side has come. Here only a stage that
has nothing else to do waits on its GPU, so receives need not be posted early.

Every program ends that ends with unlimited buffers, however few boxes there are. What a pass waits for is the first
message of its ring that was not taken. All before it were, so its box is empty or about to be, and since each ring has
a stream of its own nothing stands before it but messages that went already. Passes never wait for what they send.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.dist.context import AxisGroup
from engine.errors import LaunchError
from engine.parallel.symmetric import Mapped, library
from engine.topology.in_flight import Channel, in_flight
from engine.topology.program import Op, OpKind, Program

SPARE = 1
"""Boxes of a ring beyond what ever waits in it: the one that is being emptied."""
_SENDS = {OpKind.recv_activation: OpKind.send_activation, OpKind.recv_grad: OpKind.send_grad}


class Boxes(Protocol):
    """Boxes of equal size on every stage. One stage fills a box, and again once it was emptied."""

    def fill(self, stage: int, ring: int, box: int, message: Tensor, *, again: bool) -> None:
        """Once `message` is computed, and with `again` once the box is empty, copy it there. Does not wait.

        One ring's messages go in order, beside those of others.
        """
        ...

    def empty(self, source: int, box: int, out: Tensor) -> None:
        """Wait for what `source` puts into this stage's box, on GPUs in the stream, and copy it to `out`."""
        ...

    def finish(self) -> None:
        """Wait until everything has been sent, on GPUs in the stream."""
        ...


@dataclass(slots=True)
class Letter:
    """A message that comes."""

    boxes: Boxes
    source: int
    box: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def take(self) -> Tensor:
        """The message, once it is there. On GPUs it is the stream that waits, not the caller."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.boxes.empty(self.source, self.box, out)
        return out


class Mailboxes:
    """Stands for `engine.runtime.channels.Channels`: for each ordered pair of stages and kind a ring of boxes.

    A ring has a box more than messages of a training step ever wait in it (`in_flight`). In an evaluation, where
    nothing comes back, more may wait, in the memory of their sender. Messages of a ring are taken in the order in which
    they were sent, as `Program` promises, so both sides know the box of each by counting.
    """

    def __init__(self, program: Program, stage: int, device: torch.device) -> None:
        self._program, self._stage, self._device = program, stage, device
        self._first: dict[Channel, int] = {}
        self._length = {channel: waiting + SPARE for channel, waiting in sorted(in_flight(program).items())}
        used = [0] * program.stages
        for channel, length in self._length.items():
            self._first[channel] = used[channel[2]]
            used[channel[2]] += length
        self.count = max(used)
        """Boxes that each stage has."""
        self._sent = dict.fromkeys(self._length, 0)
        self._taken = dict.fromkeys(self._length, 0)
        self._boxes: Boxes | None = None

    def open(self, boxes: Boxes) -> Mailboxes:
        """Use these, `count` on each stage."""
        self._boxes = boxes
        return self

    def send(self, op: Op, tensor: Tensor) -> None:
        """Send what `op` names."""
        assert self._boxes is not None
        channel = op.kind, self._stage, self._program.peer(op)
        number = self._sent[channel]
        self._sent[channel] += 1
        box, again = self.box(channel, number), number >= self._length[channel]
        self._boxes.fill(channel[2], self._first[channel], box, tensor.detach().contiguous(), again=again)

    def receive(self, op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> Letter:
        """The message that `op` names, still to come."""
        assert self._boxes is not None
        channel = _SENDS[op.kind], self._program.peer(op), self._stage
        number = self._taken[channel]
        self._taken[channel] += 1
        return Letter(self._boxes, channel[1], self.box(channel, number), shape, dtype, self._device)

    def finish(self) -> None:
        """Wait until everything sent has gone."""
        assert self._boxes is not None
        self._boxes.finish()

    def box(self, channel: Channel, number: int) -> int:
        """Where message `number` of a channel is put, on the stage that takes it."""
        return self._first[channel] + number % self._length[channel]


def require_flags(boxes: int, ranks: int, pad_bytes: int) -> None:
    """Refuse more boxes than symmetric memory has flags for: two of 4 bytes for each box and rank, and the barrier's.

    Raises:
        LaunchError: 516.
    """
    needed = (1 + 2 * boxes) * ranks * 4
    if needed > pad_bytes:
        raise LaunchError.of(
            516,
            "parallel.pipeline_transport",
            "copy_engine",
            f"{boxes} boxes on each of {ranks} stages need {needed} bytes of flags, and torch keeps {pad_bytes}",
            "Use parallel.pipeline_transport=nccl, or fewer parallel.virtual_stages",
        )


class SymmetricBoxes:
    """Boxes in torch's symmetric memory.

    A flag in the receiver's memory says that a box is full, one in the sender's that it is empty again. The stream
    writes flags by itself; waiting is a kernel of one warp. Collective: all stages make theirs together.

    A flag that nobody raises for `timeout_s` ends the job with an error of the device.
    """

    def __init__(
        self,
        axis: AxisGroup,
        count: int,
        elements: int,
        dtype: torch.dtype,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._rank, self._ranks, self._count, self._elements = axis.rank, axis.size, count, elements
        self._held: list[tuple[torch.cuda.Event, Tensor]] = []
        self._mapped = Mapped(count * elements, dtype, device, axis, timeout_s)
        self._memory: Any = self._mapped.memory
        require_flags(count, axis.size, self._memory.signal_pad_size)
        self._out: defaultdict[tuple[int, int], torch.cuda.Stream] = defaultdict(
            lambda: torch.cuda.Stream(device, priority=-1)
        )
        self._back = torch.cuda.Stream(device, priority=-1)
        # Flags are zero at first. The kernel that waits is loaded here, while nothing is in flight.
        self._raise_flag(self._rank, self._full(0))
        self._wait_for_flag(self._rank, self._full(0))
        self._mapped.meet()
        torch.cuda.synchronize(device)

    def fill(self, stage: int, ring: int, box: int, message: Tensor, *, again: bool) -> None:
        """See `Boxes.fill`."""
        assert message.numel() <= self._elements, f"{message.numel()} numbers for a box of {self._elements}"
        self._held = [(event, kept) for event, kept in self._held if not event.query()]
        stream = self._out[stage, ring]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if again:
                self._wait_for_flag(stage, self._empty(box))
            self._memory.get_buffer(stage, message.shape, message.dtype, box * self._elements).copy_(message)
            self._raise_flag(stage, self._full(box))
            event = torch.cuda.Event()
            event.record()
        self._held.append((event, message))

    def empty(self, source: int, box: int, out: Tensor) -> None:
        """See `Boxes.empty`."""
        self._wait_for_flag(source, self._full(box))
        out.copy_(self._memory.get_buffer(self._rank, out.shape, out.dtype, box * self._elements))
        self._back.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._back):
            self._raise_flag(source, self._empty(box))

    def finish(self) -> None:
        """See `Boxes.finish`."""
        for event, _ in self._held:
            event.wait()
        self._held.clear()

    def _wait_for_flag(self, stage: int, channel: int) -> None:
        self._memory.wait_signal(stage, channel=channel, timeout_ms=self._mapped.timeout_ms)

    def _raise_flag(self, stage: int, channel: int) -> None:
        """As `put_signal` does, but not as a kernel, which would wait until a product leaves it room."""
        flag = self._memory.get_signal_pad(stage, (1,), torch.uint32, self._ranks * channel + self._rank)
        library()._SymmetricMemory.stream_write_value32(flag, 0, 1)

    # Channel 0 belongs to the barrier.
    def _full(self, box: int) -> int:
        return 1 + box

    def _empty(self, box: int) -> int:
        return 1 + self._count + box
