"""Pipeline schedules as data: what each stage does in which order, and what that costs in idle time and memory.

1F1B is PipeDream-Flush as used by Megatron-LM (Narayanan et al., SC21, arXiv 2104.04473, section 2.2): a warm-up of
forward passes, then one forward and one backward in turn, then the remaining backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.errors import TopologyError


class OpKind(StrEnum):
    """One instruction of a stage. Sends do not wait for the receiver."""

    load_micro_batch = "load_micro_batch"
    recv_activation = "recv_activation"
    forward = "forward"
    send_activation = "send_activation"
    recv_grad = "recv_grad"
    backward = "backward"
    send_grad = "send_grad"


@dataclass(frozen=True, slots=True)
class Op:
    """An instruction and the micro-batch it works on."""

    kind: OpKind
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Event:
    """When an instruction ran, in seconds from the start of the step."""

    stage: int
    op: Op
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step: for every stage its events in order."""

    stages: tuple[tuple[Event, ...], ...]

    @property
    def makespan(self) -> float:
        """Seconds until the last stage is done."""
        return max(event.end for events in self.stages for event in events)

    @property
    def bubble(self) -> float:
        """Idle share of all stages' time, 0..1. For 1F1B with equal stages (p - 1) / (m + p - 1)."""
        busy = sum(event.end - event.start for events in self.stages for event in events)
        return 1 - busy / (len(self.stages) * self.makespan)

    def peak_in_flight(self, stage: int) -> int:
        """Most micro-batches whose activations `stage` holds at once, for 1F1B min(p - stage, m)."""
        held = peak = 0
        for event in self.stages[stage]:
            held += (event.op.kind is OpKind.forward) - (event.op.kind is OpKind.backward)
            peak = max(peak, held)
        return peak


_SENDS = {OpKind.send_activation: (OpKind.recv_activation, 1), OpKind.send_grad: (OpKind.recv_grad, -1)}
"""Send -> the receive that takes it, and how many stages further."""


def one_f_one_b(stages: int, micro_batches: int, stage: int) -> list[Op]:
    """The instructions of `stage` for one optimizer step.

    First and last stage load the micro-batch: one needs the tokens, the other the labels. Raises `TopologyError` (216).
    """
    _check_counts(stages, micro_batches)
    if not 0 <= stage < stages:
        raise TopologyError.of(216, "stage", stage, f"the pipeline has {stages} stages", f"Use 0..{stages - 1}")
    first, last = stage == 0, stage == stages - 1
    warmup = min(stages - 1 - stage, micro_batches)
    ops: list[Op] = []

    def forward(index: int) -> None:
        if first or last:
            ops.append(Op(OpKind.load_micro_batch, index))
        if not first:
            ops.append(Op(OpKind.recv_activation, index))
        ops.append(Op(OpKind.forward, index))
        if not last:
            ops.append(Op(OpKind.send_activation, index))

    def backward(index: int) -> None:
        if not last:
            ops.append(Op(OpKind.recv_grad, index))
        ops.append(Op(OpKind.backward, index))
        if not first:
            ops.append(Op(OpKind.send_grad, index))

    for index in range(warmup):
        forward(index)
    for index in range(micro_batches - warmup):
        forward(index + warmup)
        backward(index)
    for index in range(micro_batches - warmup, micro_batches):
        backward(index)
    return ops


def simulate(stages: int, micro_batches: int, forward_s: float = 1.0, backward_s: float = 2.0) -> Timeline:
    """One 1F1B step with equal stages and free transfers. Raises `TopologyError` (216)."""
    _check_counts(stages, micro_batches)
    return execute([one_f_one_b(stages, micro_batches, stage) for stage in range(stages)], forward_s, backward_s)


def execute(programs: Sequence[Sequence[Op]], forward_s: float = 1.0, backward_s: float = 2.0) -> Timeline:
    """Run the stages' programs against each other; only forward and backward take time, receives wait for their send.

    Raises `TopologyError` (215) when stages wait for each other, naming what each of them waits for.
    """
    seconds = {OpKind.forward: forward_s, OpKind.backward: backward_s}
    arrived: dict[tuple[int, Op], float] = {}
    done: list[list[Event]] = [[] for _ in programs]
    progress = True
    while progress:
        progress = False
        for stage, program in enumerate(programs):
            while len(done[stage]) < len(program):
                op = program[len(done[stage])]
                now = done[stage][-1].end if done[stage] else 0.0
                if op.kind in (OpKind.recv_activation, OpKind.recv_grad):
                    if (stage, op) not in arrived:
                        break
                    now = max(now, arrived[stage, op])
                end = now + seconds.get(op.kind, 0.0)
                if op.kind in _SENDS:
                    receive, step = _SENDS[op.kind]
                    arrived[stage + step, Op(receive, op.micro_batch)] = end
                done[stage].append(Event(stage, op, now, end))
                progress = True
    _check_finished(programs, done)
    return Timeline(tuple(tuple(events) for events in done))


def _check_finished(programs: Sequence[Sequence[Op]], done: Sequence[Sequence[Event]]) -> None:
    waiting = [
        f"stage {stage} waits in {program[len(events)].kind} of micro-batch {program[len(events)].micro_batch}"
        for stage, (program, events) in enumerate(zip(programs, done, strict=True))
        if len(events) < len(program)
    ]
    if waiting:
        raise TopologyError.of(
            215,
            "schedule",
            f"{len(programs)} stages",
            f"deadlock: {'; '.join(waiting)}",
            "Give every receive a send of the same micro-batch in the neighbour's program, ahead of what waits for it",
        )


def _check_counts(stages: int, micro_batches: int) -> None:
    for option, value in (("parallel.pp", stages), ("train.accum_steps", micro_batches)):
        if value < 1:
            raise TopologyError.of(216, option, value, "a schedule needs at least 1", f"Use {option}=1")
