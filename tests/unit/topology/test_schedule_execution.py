from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from engine.config.enums import PipelineSchedule
from engine.errors import TopologyError
from engine.topology.execution import execute
from engine.topology.program import Op, OpKind, Program
from engine.topology.schedule import build, simulate
from engine.topology.timeline import Event, Timeline

F, B = OpKind.forward, OpKind.backward
RECV, SEND = OpKind.recv_activation, OpKind.send_activation
RECV_GRAD, SEND_GRAD = OpKind.recv_grad, OpKind.send_grad


def two_stages(first: Sequence[Op], second: Sequence[Op]) -> Program:
    return Program(2, 2, (0, 1), (tuple(first), tuple(second)))


def test_times_of_two_stages_by_hand() -> None:
    timeline = execute(build(PipelineSchedule.one_f_one_b, 2, 1), 1.0, 2.0, transfer_s=0.25)
    seen = [(e.op.kind, e.start, e.end) for e in timeline.events[1]]
    assert seen == [(RECV, 0.0, 1.25), (F, 1.25, 2.25), (B, 2.25, 4.25), (SEND_GRAD, 4.25, 4.25)]
    assert timeline.events[0][-1] == Event(0, Op(B, 0, 0), 4.5, 6.5)
    assert (timeline.makespan, timeline.ideal, timeline.busy(1)) == (6.5, 3.0, 3.0)
    assert timeline.bubble == pytest.approx(1 - 3.0 / 6.5)


def test_a_heavier_last_stage_sets_the_pace() -> None:
    program = build(PipelineSchedule.one_f_one_b, 4, 8)
    timeline = execute(program, [1.0, 1.0, 1.0, 1.5], [2.0, 2.0, 2.0, 3.0])
    # The last stage never waits after its first input: 3 to fill, 8 * 4.5, then 3 backward passes back to stage 0.
    assert timeline.makespan == pytest.approx(3 * 1.0 + 8 * 4.5 + 3 * 2.0)
    assert [timeline.busy(stage) for stage in range(4)] == pytest.approx([24.0, 24.0, 24.0, 36.0])


def test_durations_belong_to_chunks_not_to_stages() -> None:
    program = build(PipelineSchedule.dualpipev, 2, 4)
    timeline = execute(program, [1.0, 2.0, 3.0, 4.0], 0.0)
    assert [timeline.busy(stage) for stage in range(2)] == pytest.approx([4 * (1.0 + 4.0), 4 * (2.0 + 3.0)])


def test_every_message_is_received_after_it_was_sent_and_in_order() -> None:
    program = build(PipelineSchedule.interleaved, 2, 4, 3)
    timeline = execute(program)
    sent = [(e.op.kind, e.op.micro_batch, e.op.chunk, e.end) for events in timeline.events for e in events]
    ends = {(kind, i, chunk): end for kind, i, chunk, end in sent}
    for receive, send, step in ((RECV, SEND, -1), (RECV_GRAD, SEND_GRAD, 1)):
        received = [(key, end) for key, end in ends.items() if key[0] is receive]
        assert len(received) == 4 * 5
        assert all(end >= ends[send, i, chunk + step] for (_, i, chunk), end in received)


def test_deadlock_names_who_waits_for_what() -> None:
    first = [Op(RECV_GRAD, 0, 0), Op(F, 0, 0), Op(SEND, 0, 0)]
    second = [Op(RECV, 0, 1), Op(B, 0, 1), Op(SEND_GRAD, 0, 1)]
    with pytest.raises(TopologyError) as caught:
        execute(two_stages(first, second))
    text = str(caught.value)
    assert "[OCT215] schedule=2 stages: deadlock: stage 0 waits in recv_grad of micro-batch 0 for chunk 0" in text
    assert "from stage 1; stage 1 waits in recv_activation of micro-batch 0 for chunk 1 from stage 0" in text
    assert "Give every receive a send of the same micro-batch in the other stage's program" in text


def test_messages_out_of_order_name_both() -> None:
    first = [Op(F, 0, 0), Op(SEND, 0, 0), Op(F, 1, 0), Op(SEND, 1, 0)]
    second = [Op(RECV, 1, 1), Op(F, 1, 1), Op(RECV, 0, 1), Op(F, 0, 1)]
    with pytest.raises(TopologyError) as caught:
        execute(two_stages(first, second))
    text = str(caught.value)
    assert "[OCT217] schedule=stage 1: it expects recv_activation of micro-batch 1 for chunk 1" in text
    assert "the channel holds recv_activation of micro-batch 0 for chunk 1 next" in text
    assert "Send messages in the order in which the other stage receives them" in text


def test_activations_and_gradients_do_not_share_a_channel() -> None:
    """Chunks 0, 2 on stage 0 and 1 on stage 1: an activation and a gradient go from stage 0 to stage 1 and cross."""
    first = [Op(F, 0, 0), Op(SEND, 0, 0), Op(B, 1, 2), Op(SEND_GRAD, 1, 2)]
    second = [Op(RECV_GRAD, 1, 1), Op(B, 1, 1), Op(RECV, 0, 1), Op(F, 0, 1)]
    timeline = execute(Program(2, 2, (0, 1, 0), (tuple(first), tuple(second))))
    assert timeline.makespan == 6.0


def test_a_message_that_nobody_receives() -> None:
    with pytest.raises(TopologyError) as caught:
        execute(two_stages([Op(F, 0, 0), Op(SEND, 0, 0)], [Op(F, 1, 1)]))
    text = str(caught.value)
    assert (
        "[OCT217] schedule=stage 1: it never receives recv_activation of micro-batch 0 for chunk 1 from stage 0" in text
    )
    assert "Give every send a receive in the other stage's program" in text


@pytest.mark.parametrize("broken", ["drop", "swap"])
def test_a_damaged_schedule_is_found(broken: str) -> None:
    program = build(PipelineSchedule.interleaved, 2, 4, 2)
    ops = list(program.ops[1])
    sends = [index for index, op in enumerate(ops) if op.kind is SEND_GRAD]
    if broken == "drop":
        del ops[sends[0]]
    else:
        ops[sends[0]], ops[sends[1]] = ops[sends[1]], ops[sends[0]]
    with pytest.raises(TopologyError, match=r"OCT21[57]"):
        execute(replace(program, ops=(program.ops[0], tuple(ops))))


@pytest.mark.parametrize(
    ("durations", "message"),
    [
        ({"forward_s": [1.0]}, "[OCT219] forward_s=(1.0,): 1 durations for 2 chunks. Give 2 values, or one number"),
        (
            {"backward_s": -1.0},
            "[OCT219] backward_s=-1.0: a duration is at least 0 s. Use 0 for work that takes no time",
        ),
        ({"transfer_s": float("nan")}, "[OCT219] transfer_s=nan: a duration is at least 0 s"),
    ],
)
def test_durations_refused(durations: dict[str, float], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        execute(build(PipelineSchedule.one_f_one_b, 2, 2), **durations)
    assert message in str(caught.value)


def test_a_timeline_survives_json_and_any_order_of_its_rows() -> None:
    timeline = simulate(PipelineSchedule.dualpipev, 3, 6)
    rows = json.loads(json.dumps(timeline.to_rows()))
    assert Timeline.from_rows(rows) == timeline
    # Transfers take no time here, so only the passes have an order of their own.
    passes = [row for row in rows if row["kind"] in ("forward", "backward")]
    shuffled = random.Random(0).sample(passes, len(passes))
    assert Timeline.from_rows(shuffled) == Timeline.from_rows(passes)
    assert Timeline.from_rows(shuffled).bubble == pytest.approx(timeline.bubble)


def test_measured_events_start_at_zero_and_waiting_is_idle() -> None:
    events = [
        Event(1, Op(F, 0, 1), 102.0, 103.0),
        Event(1, Op(RECV, 0, 1), 100.0, 102.0),
        Event(0, Op(F, 0, 0), 100.5, 102.0),
    ]
    timeline = Timeline.from_events(events)
    assert [(e.op.kind, e.start, e.end) for e in timeline.events[1]] == [(RECV, 0.0, 2.0), (F, 2.0, 3.0)]
    assert timeline.events[0][0].start == 0.5
    assert (timeline.makespan, timeline.ideal) == (3.0, 1.25)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "[OCT220] timeline=stage 0: it has no event. Give at least one event of every stage from 0 on"),
        ([Event(1, Op(F, 0, 1), 0.0, 1.0)], "timeline=stage 0: it has no event"),
        (
            [Event(0, Op(F, 0, 0), 2.0, 1.0)],
            "stage 0 from 2.0 s to 1.0 s. Use a stage from 0 on and an end that is not",
        ),
    ],
)
def test_events_refused(events: list[Event], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Timeline.from_events(events)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        ({"kind": "sideways", "end": 1.0}, "row 1 is no event: 'sideways' is not a valid OpKind"),
        ({"start": None, "end": 1.0}, "row 1 is no event: could not convert string to float: 'None'"),
        ({}, "row 1 has no end"),
    ],
)
def test_damaged_rows_are_named(damage: dict[str, object], rule: str) -> None:
    row: dict[str, object] = {"stage": 0, "kind": "forward", "micro_batch": 0, "chunk": 0, "start": 0.0}
    with pytest.raises(TopologyError) as caught:
        Timeline.from_rows([{**row, "end": 1.0}, {**row, **damage}])
    assert "OCT220" in str(caught.value)
    assert rule in str(caught.value)
    assert "as Timeline.to_rows does" in str(caught.value)
