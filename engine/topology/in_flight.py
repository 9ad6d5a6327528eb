"""How many messages wait between two stages at once."""

from __future__ import annotations

from collections import defaultdict

from engine.topology.execution import execute
from engine.topology.program import OpKind, Program

Channel = tuple[OpKind, int, int]
"""Kind of its sends, source stage, destination stage."""

_SENT = {OpKind.recv_activation: OpKind.send_activation, OpKind.recv_grad: OpKind.send_grad}


def in_flight(program: Program) -> dict[Channel, int]:
    """The most messages of each channel that are sent and not yet taken, whichever stage is slower than all others.

    Also with equal stages. A backward pass takes twice a forward pass, messages are free, and receivers take one right
    before its pass.
    """
    found: dict[Channel, int] = {}
    equal = [1.0] * program.chunks
    slow = [[float(owner == stage) for owner in program.owner] for stage in range(program.stages)]
    for forward_s in (equal, *slow):
        for channel, changes in _changes(program, forward_s).items():
            waiting = 0
            # At equal times what is sent counts before what is taken.
            for _, _, change in sorted(changes):
                waiting += change
                found[channel] = max(found.get(channel, 0), waiting)
    return found


def _changes(program: Program, forward_s: list[float]) -> dict[Channel, list[tuple[float, int, int]]]:
    """For each channel the times of sends (0, 1) and of takes (1, -1)."""
    moments: defaultdict[Channel, list[tuple[float, int, int]]] = defaultdict(list)
    for stage, events in enumerate(execute(program, forward_s, [2 * s for s in forward_s]).events):
        for event in events:
            if event.op.kind in _SENT.values():
                moments[event.op.kind, stage, program.peer(event.op)].append((event.start, 0, 1))
            elif event.op.kind in _SENT:
                moments[_SENT[event.op.kind], program.peer(event.op), stage].append((event.end, 1, -1))
    return moments
