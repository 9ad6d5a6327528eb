"""When receives are posted, so that a program needs no buffers between its stages.

On GPUs a message in flight is a kernel that runs until the other side has come. Meanwhile nothing may need the device
for itself, as the first launch of a kernel does: that waits for everything in flight. In the worst case each pass waits
for all messages posted before it, also those that its stage sends. 1F1B ends even so when each receive is posted right
before its pass. The other schedules end when some are posted earlier, which Megatron-LM gets by exchanging all messages
of a forward and a backward pass at once (arXiv 2104.04473, section 4.1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from engine.topology.program import COMPUTE, Op, OpKind, Program

EarlyReceives = dict[int, list[Op]]
"""Number of a pass -> receives of later passes that are posted before it."""

_SENDS = (OpKind.send_activation, OpKind.send_grad)
_Message = tuple[bool, int, int]


def early_receives(program: Program) -> tuple[EarlyReceives, ...]:
    """For each stage the receives to be posted before the gap in which they stand, and where.

    Stages are played against each other, each waiting in every gap between two passes until all messages there have met
    the other side. Whenever all are stuck, a stage whose message is awaited in a later gap gets its receive posted now.
    """
    stages = [gaps(ops) for ops in program.ops]
    early: tuple[EarlyReceives, ...] = tuple(defaultdict(list) for _ in stages)
    at = [0] * program.stages
    sent: set[_Message] = set()
    awaited: set[_Message] = set()

    def post(op: Op) -> None:
        (sent if op.kind in _SENDS else awaited).add(message(op))

    def has_met(op: Op) -> bool:
        return message(op) in (awaited if op.kind in _SENDS else sent)

    for stage in stages:
        for op in stage[0]:
            post(op)
    while any(position + 1 < len(stage) for position, stage in zip(at, stages, strict=True)):
        progress = False
        for number, stage in enumerate(stages):
            while at[number] + 1 < len(stage) and all(has_met(op) for op in stage[at[number]]):
                at[number] += 1
                for op in stage[at[number]]:
                    post(op)
                progress = True
        if progress:
            continue
        lonely = [op for number, stage in enumerate(stages) for op in stage[at[number]] if op.kind in _SENDS]
        for send in (op for op in lonely if not has_met(op)):
            receive = _receive_of(send)
            receiver = program.owner[receive.chunk]
            early[receiver][at[receiver]].append(receive)
            post(receive)
            progress = True
        assert progress, "the program has a deadlock of its own"
    return tuple(dict(found) for found in early)


def gaps(ops: Sequence[Op]) -> list[list[Op]]:
    """What a stage sends and receives before its first pass, between two passes, and after the last."""
    found: list[list[Op]] = [[]]
    for op in ops:
        if op.kind in COMPUTE:
            found.append([])
        else:
            found[-1].append(op)
    return found


def message(op: Op) -> _Message:
    """Equal for a send and its receive: whether it is a gradient, the micro-batch, the receiving chunk."""
    gradient = op.kind in (OpKind.send_grad, OpKind.recv_grad)
    step = {OpKind.send_activation: 1, OpKind.send_grad: -1}.get(op.kind, 0)
    return gradient, op.micro_batch, op.chunk + step


def _receive_of(send: Op) -> Op:
    gradient, micro_batch, chunk = message(send)
    return Op(OpKind.recv_grad if gradient else OpKind.recv_activation, micro_batch, chunk)
