"""Point-to-point messages between the stages of a pipeline: sends that do not wait, receives that are posted early."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import ParallelContext
from engine.topology.program import Op, OpKind, Program

_SENDS = {OpKind.send_activation: OpKind.recv_activation, OpKind.send_grad: OpKind.recv_grad}


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

    NCCL runs the messages between two ranks of a communicator one after the other, so two stages that both send before
    they receive would wait for each other: here each channel has a communicator of its own. gloo needs only tags.
    Collective: all ranks make theirs together.
    """

    def __init__(self, ctx: ParallelContext, program: Program) -> None:
        self._ctx, self._program = ctx, program
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._groups: dict[tuple[OpKind, bool], dist.ProcessGroup | None] = {}
        for kind in _SENDS:
            for upward in (True, False):
                used = any(
                    op.kind is kind and (program.peer(op) > stage) is upward
                    for stage, ops in enumerate(program.ops)
                    for op in ops
                )
                if used:
                    self._groups[kind, upward] = self._group()

    def _group(self) -> dist.ProcessGroup | None:
        if self._ctx.device.type != "cuda":
            return self._ctx.pp.group
        mine = None
        for ranks in self._ctx.grid.groups("pp"):
            group = dist.new_group(ranks)
            if self._ctx.rank in ranks:
                mine = group
        return mine

    def send(self, op: Op, tensor: Tensor) -> None:
        """Send what `op` names. Keeps the tensor until it has gone."""
        peer = self._program.peer(op)
        tensor = tensor.detach().contiguous()
        group = self._groups[op.kind, peer > self._ctx.pp.rank]
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        work = dist.isend(tensor, self._ctx.pp.ranks[peer], group=group, tag=self._tag(op))
        assert work is not None
        self._sent.append((work, tensor))

    def receive(self, op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> Incoming:
        """Post the receive that `op` names."""
        peer = self._program.peer(op)
        kind = OpKind.send_activation if op.kind is OpKind.recv_activation else OpKind.send_grad
        buffer = torch.empty(shape, dtype=dtype, device=self._ctx.device)
        group = self._groups[kind, self._ctx.pp.rank > peer]
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
