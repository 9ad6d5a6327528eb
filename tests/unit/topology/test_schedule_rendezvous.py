"""Programs end also when messages are handed over in person: nothing is buffered, each pass waits for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from engine.config.enums import PipelineSchedule
from engine.topology.program import Op, OpKind, Program
from engine.topology.rendezvous import EarlyReceives, early_receives, gaps, message
from engine.topology.schedule import build

SENDS = (OpKind.send_activation, OpKind.send_grad)


def ends(program: Program, early: Sequence[EarlyReceives]) -> bool:
    """Whether all stages come to their end when a gap is left only after all its messages have met the other side."""
    stages = [
        [[*gap, *posts.get(number, [])] for number, gap in enumerate(gaps(ops))]
        for ops, posts in zip(program.ops, early, strict=True)
    ]
    at = [0] * program.stages
    first = [op for stage in stages for op in stage[0]]
    here = {sent: {message(op) for op in first if (op.kind in SENDS) is sent} for sent in (False, True)}
    progress = True
    while progress:
        progress = False
        for number, stage in enumerate(stages):
            met = all(message(op) in here[op.kind not in SENDS] for op in stage[at[number]])
            if met and at[number] + 1 < len(stage):
                at[number] += 1
                for op in stage[at[number]]:
                    here[op.kind in SENDS].add(message(op))
                progress = True
    last = [op for stage in stages for op in stage[-1]]
    done = all(position + 1 == len(stage) for position, stage in zip(at, stages, strict=True))
    return done and all(message(op) in here[op.kind not in SENDS] for op in last)


def programs() -> Iterator[Program]:
    for stages in (2, 3, 4, 8):
        for micro_batches in (1, 2, 3, 4, 8, 17, 24):
            yield build(PipelineSchedule.one_f_one_b, stages, micro_batches)
            for virtual in (2, 3, 4):
                if micro_batches % stages == 0:
                    yield build(PipelineSchedule.interleaved, stages, micro_batches, virtual)
                yield build(PipelineSchedule.interleaved, stages, micro_batches, virtual, forward_only=True)
            if micro_batches >= 2 * stages:
                yield build(PipelineSchedule.dualpipev, stages, micro_batches)
            yield build(PipelineSchedule.dualpipev, stages, micro_batches, forward_only=True)


def nothing(program: Program) -> list[EarlyReceives]:
    return [{} for _ in range(program.stages)]


def test_every_program_ends_without_buffers() -> None:
    assert all(ends(program, early_receives(program)) for program in programs())


def test_1f1b_needs_no_early_receive_and_the_others_do() -> None:
    plain = build(PipelineSchedule.one_f_one_b, 4, 8)
    assert early_receives(plain) == ({}, {}, {}, {})
    assert ends(plain, nothing(plain))
    for program in (build(PipelineSchedule.interleaved, 2, 4, 2), build(PipelineSchedule.dualpipev, 2, 4)):
        assert not ends(program, nothing(program))


def test_receives_of_a_channel_stay_in_order() -> None:
    for program in programs():
        for stage, (ops, early) in enumerate(zip(program.ops, early_receives(program), strict=True)):
            posted: list[Op] = []
            for number, gap in enumerate(gaps(ops)):
                posted += [op for op in gap if op.kind not in SENDS and op not in posted]
                posted += early.get(number, [])
            channels: defaultdict[tuple[int, OpKind], list[Op]] = defaultdict(list)
            for op in (op for op in ops if op.kind in (OpKind.recv_activation, OpKind.recv_grad)):
                channels[program.peer(op), op.kind].append(op)
            for channel, wanted in channels.items():
                assert [op for op in posted if op in wanted] == wanted, (stage, channel)
