from __future__ import annotations

from collections import Counter

import pytest

from engine.errors import TopologyError
from engine.topology.schedule import Op, OpKind, execute, one_f_one_b, simulate

SHAPES = [(p, m) for p in range(1, 9) for m in (1, 2, 3, 4, 7, 8, 16, 64)]


def letters(stages: int, micro_batches: int, stage: int) -> str:
    names = {OpKind.forward: "F", OpKind.backward: "B"}
    ops = one_f_one_b(stages, micro_batches, stage)
    return " ".join(f"{names[op.kind]}{op.micro_batch}" for op in ops if op.kind in names)


def test_order_of_the_paper() -> None:
    assert letters(3, 4, 0) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert letters(3, 4, 1) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert letters(3, 4, 2) == "F0 B0 F1 B1 F2 B2 F3 B3"


def test_fewer_micro_batches_than_stages() -> None:
    assert letters(4, 2, 0) == "F0 F1 B0 B1"


def test_transfers_around_a_middle_stage() -> None:
    first = one_f_one_b(3, 1, 1)
    assert [op.kind.value for op in first] == [
        "recv_activation",
        "forward",
        "send_activation",
        "recv_grad",
        "backward",
        "send_grad",
    ]


def test_only_the_ends_load_data_and_one_stage_sends_nothing() -> None:
    loads = [sum(op.kind is OpKind.load_micro_batch for op in one_f_one_b(3, 5, stage)) for stage in range(3)]
    assert loads == [5, 0, 5]
    assert {op.kind for op in one_f_one_b(1, 5, 0)} == {OpKind.load_micro_batch, OpKind.forward, OpKind.backward}


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_bubble_and_memory_follow_the_closed_formulas(stages: int, micro_batches: int) -> None:
    timeline = simulate(stages, micro_batches)
    assert timeline.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1), abs=1e-12)
    assert timeline.makespan == pytest.approx(3.0 * (micro_batches + stages - 1))
    for stage in range(stages):
        assert timeline.peak_in_flight(stage) == min(stages - stage, micro_batches)


def test_bubble_does_not_depend_on_the_speed_of_the_passes() -> None:
    assert simulate(4, 8, forward_s=0.3, backward_s=0.5).bubble == pytest.approx(3 / 11)


def test_every_send_is_received_after_it_was_sent() -> None:
    timeline = simulate(4, 6)
    for receive, send, step in (
        (OpKind.recv_activation, OpKind.send_activation, -1),
        (OpKind.recv_grad, OpKind.send_grad, 1),
    ):
        ends = {(e.stage, e.op.micro_batch): e.end for events in timeline.stages for e in events if e.op.kind is send}
        received = [e for events in timeline.stages for e in events if e.op.kind is receive]
        assert len(received) == len(ends) == 3 * 6
        assert all(event.start >= ends[event.stage + step, event.op.micro_batch] for event in received)


def test_every_micro_batch_runs_once_per_stage() -> None:
    for events in simulate(3, 5).stages:
        counts = Counter(event.op for event in events)
        assert all(counts[Op(kind, i)] == 1 for kind in (OpKind.forward, OpKind.backward) for i in range(5))


def test_deadlock_names_who_waits_for_what() -> None:
    first = [Op(OpKind.recv_grad, 0), Op(OpKind.forward, 0), Op(OpKind.send_activation, 0)]
    second = [Op(OpKind.recv_activation, 0), Op(OpKind.backward, 0), Op(OpKind.send_grad, 0)]
    with pytest.raises(TopologyError) as caught:
        execute([first, second])
    text = str(caught.value)
    assert "[OCT215] schedule=2 stages: deadlock: stage 0 waits in recv_grad of micro-batch 0" in text
    assert "stage 1 waits in recv_activation of micro-batch 0" in text
    assert "a send of the same micro-batch in the neighbour's program" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0), "[OCT216] parallel.pp=0: a schedule needs at least 1. Use parallel.pp=1"),
        ((2, 0, 0), "[OCT216] train.accum_steps=0: a schedule needs at least 1. Use train.accum_steps=1"),
        ((2, 4, 2), "[OCT216] stage=2: the pipeline has 2 stages. Use 0..1"),
    ],
)
def test_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        one_f_one_b(*arguments)
    assert message in str(caught.value)
