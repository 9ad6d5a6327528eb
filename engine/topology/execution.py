"""Runs a pipeline program on a clock: how long it takes, who waits, and whether it can finish at all."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple

from engine.errors import TopologyError
from engine.topology.program import COMPUTE, Op, OpKind, Program
from engine.topology.timeline import Event, Timeline

Seconds = float | Sequence[float]
"""The same for all chunks, or one value per chunk."""

_RECEIVES = {OpKind.recv_activation: OpKind.send_activation, OpKind.recv_grad: OpKind.send_grad}


class _Channel(NamedTuple):
    """One ordered pair of stages, for activations or for gradients."""

    source: int
    destination: int
    kind: OpKind


class _Message(NamedTuple):
    receive: Op
    arrives: float


def execute(program: Program, forward_s: Seconds = 1.0, backward_s: Seconds = 2.0, transfer_s: float = 0.0) -> Timeline:
    """Run the stages' operations against each other.

    Forward and backward passes take `forward_s` and `backward_s` of their chunk. A send takes no time and never waits;
    its message is there `transfer_s` later. Each ordered pair of stages has one first-in first-out channel for
    activations and one for gradients. A receive waits for its message.

    Raises:
        TopologyError: 215 stages wait for each other; 217 a message is not the one that its receiver expects, or nobody
            receives it; 219 a duration is negative or there is not one per chunk.
    """
    seconds = {
        OpKind.forward: _per_chunk("forward_s", forward_s, program.chunks),
        OpKind.backward: _per_chunk("backward_s", backward_s, program.chunks),
    }
    _per_chunk("transfer_s", transfer_s, 1)
    channels: defaultdict[_Channel, deque[_Message]] = defaultdict(deque)
    done: list[list[Event]] = [[] for _ in program.ops]
    progress = True
    while progress:
        progress = False
        for stage, ops in enumerate(program.ops):
            events = done[stage]
            while len(events) < len(ops):
                op = ops[len(events)]
                start = end = events[-1].end if events else 0.0
                if op.kind in _RECEIVES:
                    queue = channels[_Channel(program.peer(op), stage, _RECEIVES[op.kind])]
                    if not queue:
                        break
                    end = max(start, _take(queue, stage, op))
                elif op.kind in COMPUTE:
                    end = start + seconds[op.kind][op.chunk]
                else:
                    message = _Message(_receive_of(op), start + transfer_s)
                    channels[_Channel(stage, program.peer(op), op.kind)].append(message)
                events.append(Event(stage, op, start, end))
                progress = True
    _check_finished(program, done)
    _check_received(channels)
    return Timeline(tuple(tuple(events) for events in done))


def _per_chunk(name: str, seconds: Seconds, chunks: int) -> tuple[float, ...]:
    values = (float(seconds),) * chunks if isinstance(seconds, int | float) else tuple(seconds)
    if len(values) != chunks:
        rule = f"{len(values)} durations for {chunks} chunks"
        raise TopologyError.of(219, name, values, rule, f"Give {chunks} values, or one number for all chunks")
    if any(not value >= 0 for value in values):
        raise TopologyError.of(219, name, seconds, "a duration is at least 0 s", "Use 0 for work that takes no time")
    return values


def _receive_of(send: Op) -> Op:
    if send.kind is OpKind.send_activation:
        return Op(OpKind.recv_activation, send.micro_batch, send.chunk + 1)
    return Op(OpKind.recv_grad, send.micro_batch, send.chunk - 1)


def _take(queue: deque[_Message], stage: int, expected: Op) -> float:
    message = queue.popleft()
    if message.receive != expected:
        raise TopologyError.of(
            217,
            "schedule",
            f"stage {stage}",
            f"it expects {_name(expected)} and the channel holds {_name(message.receive)} next",
            "Send messages in the order in which the other stage receives them",
        )
    return message.arrives


def _check_finished(program: Program, done: Sequence[Sequence[Event]]) -> None:
    waiting = [
        f"stage {stage} waits in {_name(ops[len(events)])} from stage {program.peer(ops[len(events)])}"
        for stage, (ops, events) in enumerate(zip(program.ops, done, strict=True))
        if len(events) < len(ops)
    ]
    if waiting:
        raise TopologyError.of(
            215,
            "schedule",
            f"{program.stages} stages",
            f"deadlock: {'; '.join(waiting)}",
            "Give every receive a send of the same micro-batch in the other stage's program, ahead of what needs it",
        )


def _check_received(channels: dict[_Channel, deque[_Message]]) -> None:
    for channel, queue in channels.items():
        if queue:
            raise TopologyError.of(
                217,
                "schedule",
                f"stage {channel.destination}",
                f"it never receives {_name(queue[0].receive)} from stage {channel.source}",
                "Give every send a receive in the other stage's program",
            )


def _name(op: Op) -> str:
    return f"{op.kind} of micro-batch {op.micro_batch} for chunk {op.chunk}"
