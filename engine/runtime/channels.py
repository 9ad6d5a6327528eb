"""Point-to-point messages between the stages of a pipeline. Sends do not wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import ParallelContext
from engine.topology.program import Op, OpKind, Program

_SENDS = (OpKind.send_activation, OpKind.send_grad)


@dataclass(slots=True)
class Incoming:
    """A posted receive."""

    buffer: Tensor
    work: dist.Work

    def take(self) -> Tensor:
        """The message, once it is there. On GPUs it is the stream that waits, not the caller."""
        self.work.wait()
        return self.buffer


class Channels:
    """One first-in first-out channel for each ordered pair of stages and each of activations and gradients.

    NCCL runs the messages of a rank in a communicator one after the other, so two stages that both send before they
    receive would wait for each other, and a receive would wait behind a send to a third: here a stage has at most one
    channel in each communicator, which hold those of every second source. gloo needs only tags.

    A message in flight on a GPU is a kernel that runs until the other side has come, and the start of a communicator
    waits for it. So all communicators are started here; `engine.topology.rendezvous` says when receives are posted.

    Collective: all ranks make theirs together.
    """

    def __init__(self, ctx: ParallelContext, program: Program) -> None:
        self._ctx, self._program = ctx, program
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._groups: dict[tuple[OpKind, bool, int], dist.ProcessGroup | None] = {}
        pairs = sorted(
            {
                (op.kind, program.peer(op) > stage, stage, program.peer(op))
                for stage, ops in enumerate(program.ops)
                for op in ops
                if op.kind in _SENDS
            }
        )
        for kind, upward, source, _ in pairs:
            if (kind, upward, source % 2) not in self._groups:
                self._groups[kind, upward, source % 2] = self._group()
        if ctx.device.type == "cuda":
            for kind, upward, source, destination in pairs:
                self._connect(self._groups[kind, upward, source % 2], source, destination)
            torch.cuda.synchronize(ctx.device)

    def _group(self) -> dist.ProcessGroup | None:
        if self._ctx.device.type != "cuda":
            return self._ctx.pp.group
        mine = None
        for ranks in self._ctx.grid.groups("pp"):
            group = dist.new_group(ranks)
            if self._ctx.rank in ranks:
                mine = group
        return mine

    def _connect(self, group: dist.ProcessGroup | None, source: int, destination: int) -> None:
        """Start the communicator of a channel with a message that nobody reads."""
        message = torch.zeros(1, device=self._ctx.device)
        if self._ctx.pp.rank == source:
            dist.send(message, self._ctx.pp.ranks[destination], group=group)
        elif self._ctx.pp.rank == destination:
            dist.recv(message, self._ctx.pp.ranks[source], group=group)

    def send(self, op: Op, tensor: Tensor) -> None:
        """Send what `op` names. Keeps the tensor until it has gone."""
        peer = self._program.peer(op)
        tensor = tensor.detach().contiguous()
        group = self._groups[op.kind, peer > self._ctx.pp.rank, self._ctx.pp.rank % 2]
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        work = dist.isend(tensor, self._ctx.pp.ranks[peer], group=group, tag=self._tag(op))
        assert work is not None
        self._sent.append((work, tensor))

    def receive(self, op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> Incoming:
        """Post the receive that `op` names."""
        peer = self._program.peer(op)
        kind = OpKind.send_activation if op.kind is OpKind.recv_activation else OpKind.send_grad
        buffer = torch.empty(shape, dtype=dtype, device=self._ctx.device)
        group = self._groups[kind, self._ctx.pp.rank > peer, peer % 2]
        work = dist.irecv(buffer, self._ctx.pp.ranks[peer], group=group, tag=self._tag(op))
        assert work is not None
        return Incoming(buffer, work)

    def finish(self) -> None:
        """Wait until everything sent has gone."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _tag(self, op: Op) -> int:
        """Equal for the send and the receive of a message: numbered by the chunk that receives it."""
        chunk = op.chunk
        if op.kind in _SENDS:
            chunk += 1 if op.kind is OpKind.send_activation else -1
        gradient = op.kind in (OpKind.send_grad, OpKind.recv_grad)
        return (op.micro_batch * self._program.chunks + chunk) * 2 + gradient
