from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from engine.config.enums import PipelineSchedule
from engine.errors import TopologyError
from engine.topology.program import COMPUTE, Op, OpKind, Program
from engine.topology.schedule import bubble_formula, build, chunks_per_stage, peak_formula, simulate

PLAIN, INTERLEAVED, DUALPIPEV = (PipelineSchedule[n] for n in ("one_f_one_b", "interleaved", "dualpipev"))
FORWARD, BACKWARD = COMPUTE
RATIOS = ((1.0, 2.0), (1.0, 1.0), (3.0, 1.0), (9.0, 10.0), (1.0, 10.0))
MICRO_BATCHES = (*range(1, 21), 24, 31, 32, 40, 48, 56, 63, 64)


def legal(schedule: PipelineSchedule, stages: int) -> Iterator[tuple[int, int]]:
    """Micro-batches and virtual stages."""
    for micro_batches in MICRO_BATCHES:
        if schedule is PLAIN or (schedule is DUALPIPEV and micro_batches >= 2 * stages):
            yield micro_batches, 1
        elif schedule is INTERLEAVED and micro_batches % stages == 0:
            yield from ((micro_batches, parts) for parts in (1, 2, 3))


def letters(program: Program, stage: int) -> str:
    """F0.1 is the forward pass of micro-batch 0 through the stage's second chunk; one chunk: F0."""
    chunks = program.chunks_of(stage)
    part = {chunk: f".{index}" if len(chunks) > 1 else "" for index, chunk in enumerate(chunks)}
    passes = (op for op in program.ops[stage] if op.kind in COMPUTE)
    return " ".join(f"{op.kind.value[0].upper()}{op.micro_batch}{part[op.chunk]}" for op in passes)


def check_structure(program: Program, *, backward: bool = True) -> None:
    """Each pass once, on the owner of its chunk, between exactly the transfers that its neighbours' places ask for."""
    kinds = COMPUTE if backward else (FORWARD,)
    last = program.chunks - 1
    for stage, ops in enumerate(program.ops):
        expected: Counter[Op] = Counter()
        for position, op in enumerate(ops):
            if op.kind not in kinds:
                continue
            step = 1 if op.kind is FORWARD else -1
            name = "activation" if op.kind is FORWARD else "grad"
            around: list[Op] = []
            for offset, verb in ((-step, "recv"), (step, "send")):
                other = op.chunk + offset
                if 0 <= other <= last and program.owner[other] != stage:
                    transfer = Op(OpKind[f"{verb}_{name}"], op.micro_batch, op.chunk)
                    assert ops[position + (1 if verb == "send" else -1)] == transfer
                    assert program.peer(transfer) == program.owner[other]
                    around.append(transfer)
            expected.update([op, *around])
        assert Counter(ops) == expected
        passes = {(op.kind, op.chunk, op.micro_batch): index for index, op in enumerate(ops) if op.kind in COMPUTE}
        chunks = program.chunks_of(stage)
        assert set(passes) == {(k, c, i) for k in kinds for c in chunks for i in range(program.micro_batches)}
        for kind, chunk, i in passes:
            # What comes from the same stage is not received, so the order alone has to be right.
            if kind is BACKWARD:
                assert passes[FORWARD, chunk, i] < passes[BACKWARD, chunk, i]
                assert passes[BACKWARD, chunk, i] > passes.get((BACKWARD, chunk + 1, i), -1)
            else:
                assert passes[FORWARD, chunk, i] > passes.get((FORWARD, chunk - 1, i), -1)


def test_order_of_the_paper() -> None:
    program = build(PLAIN, 3, 4)
    assert letters(program, 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert letters(program, 1) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert letters(program, 2) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert letters(build(PLAIN, 4, 2), 0) == "F0 F1 B0 B1"


def test_interleaved_order_of_the_paper() -> None:
    """Figure 4 of arXiv 2104.04473 with two devices: groups of two micro-batches through both chunks."""
    program = build(INTERLEAVED, 2, 4, 2)
    assert program.owner == (0, 1, 0, 1)
    last = "F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 F2.0 B0.0 F3.0 B1.0 F2.1 B2.1 F3.1 B3.1 B2.0 B3.0"
    assert letters(program, 1) == last
    first = "F0.0 F1.0 F0.1 F1.1 F2.0 B0.1 F3.0 B1.1 F2.1 B0.0 F3.1 B1.0 B2.1 B3.1 B2.0 B3.0"
    assert letters(program, 0) == first


def test_dualpipev_places_the_ends_together_and_turns_around_without_a_message() -> None:
    program = build(DUALPIPEV, 2, 4)
    assert program.owner == (0, 1, 1, 0)
    first = [op for op in program.ops[1] if op.micro_batch == 0]
    assert [(op.kind.value, op.chunk) for op in first] == [
        ("recv_activation", 1),
        ("forward", 1),
        ("forward", 2),
        ("send_activation", 2),
        ("recv_grad", 2),
        ("backward", 2),
        ("backward", 1),
        ("send_grad", 1),
    ]


def test_one_stage_sends_nothing_in_any_schedule() -> None:
    for program in (build(PLAIN, 1, 3), build(INTERLEAVED, 1, 3, 3), build(DUALPIPEV, 1, 3)):
        assert {op.kind for op in program.ops[0]} == set(COMPUTE)


def test_a_pass_has_no_peer() -> None:
    program = build(PLAIN, 2, 1)
    assert program.peer(Op(OpKind.send_grad, 0, 1)) == 0
    with pytest.raises(ValueError, match="has no peer"):
        program.peer(Op(FORWARD, 0, 0))


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("schedule", PipelineSchedule)
def test_time_and_memory_follow_the_closed_formulas(schedule: PipelineSchedule, stages: int) -> None:
    """The simulator also refuses programs that deadlock or receive messages out of order."""
    for number, (micro_batches, parts) in enumerate(legal(schedule, stages)):
        forward_s, backward_s = RATIOS[number % len(RATIOS)]
        timeline = simulate(schedule, stages, micro_batches, parts, forward_s, backward_s)
        expected = bubble_formula(schedule, stages, micro_batches, parts, forward_s, backward_s)
        assert timeline.bubble == pytest.approx(expected, abs=1e-12)
        assert timeline.ideal == pytest.approx(micro_batches * (forward_s + backward_s))
        for stage in range(stages):
            peak = peak_formula(schedule, stages, micro_batches, stage, parts)
            assert timeline.peak_in_flight(stage) == peak


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_ratio_of_forward_to_backward(ratio: tuple[float, float]) -> None:
    for schedule in PipelineSchedule:
        for stages in (1, 2, 3, 4, 8):
            for parts in (1,) if schedule is not INTERLEAVED else (2, 3):
                timeline = simulate(schedule, stages, 2 * stages, parts, *ratio)
                expected = bubble_formula(schedule, stages, 2 * stages, parts, *ratio)
                assert timeline.bubble == pytest.approx(expected, abs=1e-12)


def test_formulas_by_hand() -> None:
    assert bubble_formula(PLAIN, 4, 8) == pytest.approx(3 / 11)
    assert bubble_formula(INTERLEAVED, 4, 8, 2) == pytest.approx(3 / 19)
    # A chunk takes 1 forward and 2 backward: idle is 2 * 3 * 2 - 1 = 11 beside 8 * 6.
    assert bubble_formula(DUALPIPEV, 4, 8, forward_s=2.0, backward_s=4.0) == pytest.approx(11 / 59)
    assert [peak_formula(PLAIN, 4, 8, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [peak_formula(INTERLEAVED, 4, 8, stage, 2) for stage in range(4)] == [11, 9, 7, 5]
    assert [peak_formula(DUALPIPEV, 4, 8, stage) for stage in range(4)] == [9, 9, 9, 9]


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("schedule", PipelineSchedule)
def test_every_pass_runs_once_between_its_transfers(schedule: PipelineSchedule, stages: int) -> None:
    for micro_batches, parts in legal(schedule, stages):
        if micro_batches <= 16:
            program = build(schedule, stages, micro_batches, parts)
            assert program.chunks == stages * chunks_per_stage(schedule, parts)
            check_structure(program)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PLAIN, 0, 4), "[OCT216] parallel.pp=0: a schedule needs at least 1. Use parallel.pp=1"),
        ((PLAIN, 2, 0), "[OCT216] train.accum_steps=0: a schedule needs at least 1. Use train.accum_steps=1"),
        ((INTERLEAVED, 2, 4, 0), "[OCT216] parallel.virtual_stages=0: a schedule needs at least 1."),
        (
            (INTERLEAVED, 4, 6, 2),
            "[OCT218] train.accum_steps=6: interleaved takes micro-batches in groups of parallel.pp=4. "
            "Use train.accum_steps=4 or 8",
        ),
        ((INTERLEAVED, 4, 3, 2), "Use train.accum_steps=4"),
        (
            (DUALPIPEV, 4, 7),
            "[OCT218] train.accum_steps=7: dualpipev needs at least 2 * parallel.pp = 8 micro-batches. "
            "Use train.accum_steps=8",
        ),
        (
            (DUALPIPEV, 2, 4, 2),
            "[OCT218] parallel.virtual_stages=2: parallel.schedule=dualpipev fixes the chunks per stage at 2. "
            "Use parallel.virtual_stages=1, or parallel.schedule=interleaved",
        ),
        ((PLAIN, 2, 4, 2), "parallel.schedule=one_f_one_b fixes the chunks per stage at 1"),
    ],
)
def test_refused(arguments: tuple[PipelineSchedule, int, int], message: str) -> None:
    for call in (build, simulate, bubble_formula):
        with pytest.raises(TopologyError) as caught:
            call(*arguments)
        assert message in str(caught.value)


def test_peak_of_a_stage_that_is_not_there() -> None:
    with pytest.raises(TopologyError) as caught:
        peak_formula(PLAIN, 2, 4, 2)
    assert "[OCT216] stage=2: the pipeline has 2 stages. Use 0..1" in str(caught.value)
