"""Runs this stage's part of a pipeline program: any schedule of `engine.topology.schedule`, training or evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.dist.context import ParallelContext
from engine.model.feed import Feed
from engine.runtime.channels import Channels, Incoming
from engine.runtime.mailboxes import Letter, Mailboxes
from engine.topology.program import Op, OpKind, Program
from engine.topology.rendezvous import early_receives
from engine.topology.timeline import Event

Place = tuple[int, int]
"""A chunk and a micro-batch."""
Messages = Channels | Mailboxes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """What the executor runs."""

    chunks: Mapping[int, nn.Module]
    """Chunk number -> layers that take the residual stream and a feed. The last chunk's output goes to `loss`."""
    loss: nn.Module
    backward: Callable[[Tensor, Tensor | None], None]
    """Backward pass from an output and its gradient; from a share of the loss and None for the last chunk."""
    width: int
    dtype: torch.dtype


class Executor:
    """One stage's interpreter.

    `trace`, when a list, collects the time of each operation (tests and timelines); `channels` may be exchanged between
    steps (benchmarks).
    """

    def __init__(self, program: Program, model: StageModel, ctx: ParallelContext, channels: Messages) -> None:
        self._program, self._model, self._ctx, self.channels = program, model, ctx, channels
        self._ops = program.ops[ctx.pp.rank]
        self._early = early_receives(program)[ctx.pp.rank]
        self._last = program.chunks - 1
        self.trace: list[Event] | None = None

    def run(self, feeds: Sequence[Feed], *, train: bool) -> Tensor:
        """All operations of one step. Returns the sum of this stage's shares of the loss: 0 without the last chunk."""
        self._feeds = feeds
        self._inputs: dict[Place, Tensor] = {}
        self._outputs: dict[Place, Tensor] = {}
        self._grads: dict[Place, Tensor] = {}
        self._posted: dict[Op, Incoming | Letter] = {}
        self._passes = 0
        self._total = torch.zeros((), device=self._ctx.device)
        with torch.set_grad_enabled(train):
            for op in self._ops:
                start = time.perf_counter()
                self._execute(op, train)
                if self.trace is not None:
                    if self._ctx.device.type == "cuda":
                        torch.cuda.synchronize()
                    self.trace.append(Event(self._ctx.pp.rank, op, start, time.perf_counter()))
        self.channels.finish()
        return self._total

    def _execute(self, op: Op, train: bool) -> None:
        place = op.chunk, op.micro_batch
        match op.kind:
            case OpKind.recv_activation:
                self._inputs[place] = self._receive(op).requires_grad_(train)
            case OpKind.recv_grad:
                self._grads[place] = self._receive(op)
            case OpKind.forward:
                self._post_early()
                self._forward(op, train)
            case OpKind.backward:
                self._post_early()
                self._backward(op)
            case OpKind.send_activation:
                output = self._outputs[place] if train else self._outputs.pop(place)
                self.channels.send(op, output)
            case OpKind.send_grad:
                self.channels.send(op, self._take_input_grad(place))

    def _forward(self, op: Op, train: bool) -> None:
        place, feed = (op.chunk, op.micro_batch), self._feeds[op.micro_batch]
        above = op.chunk - 1, op.micro_batch
        if place not in self._inputs and op.chunk > 0:
            # The chunk before is on this stage too: the schedule turns around here.
            output = self._outputs[above] if train else self._outputs.pop(above)
            self._inputs[place] = output.detach().requires_grad_(train)
        x = self._inputs.get(place) if train else self._inputs.pop(place, None)
        out = self._model.chunks[op.chunk](x, feed)
        if op.chunk == self._last:
            out = self._model.loss(out, feed)
            self._total += out.detach()
        if train or op.chunk != self._last:
            self._outputs[place] = out

    def _backward(self, op: Op) -> None:
        place = op.chunk, op.micro_batch
        gradient = None
        if op.chunk != self._last:
            gradient = self._grads.pop(place, None)
            if gradient is None:
                gradient = self._take_input_grad((op.chunk + 1, op.micro_batch))
        self._model.backward(self._outputs.pop(place), gradient)

    def _take_input_grad(self, place: Place) -> Tensor:
        gradient = self._inputs.pop(place).grad
        assert gradient is not None
        return gradient

    def _receive(self, op: Op) -> Tensor:
        posted = self._posted.pop(op, None) or self._post(op)
        return posted.take()

    def _post_early(self) -> None:
        """Post what a later pass receives where its sender may wait for it; see `engine.topology.rendezvous`."""
        for op in self._early.get(self._passes, ()):
            self._posted[op] = self._post(op)
        self._passes += 1

    def _post(self, op: Op) -> Incoming | Letter:
        feed = self._feeds[op.micro_batch]
        shape = (feed.tokens_BS.shape[0], feed.positions_L.shape[0], self._model.width)
        return self.channels.receive(op, shape, self._model.dtype)
