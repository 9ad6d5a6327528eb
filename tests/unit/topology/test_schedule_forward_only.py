from __future__ import annotations

import pytest

from engine.config.enums import PipelineSchedule
from engine.topology.execution import execute
from engine.topology.program import OpKind
from engine.topology.schedule import build
from tests.unit.topology.test_schedule import check_structure, letters


@pytest.mark.parametrize("schedule", PipelineSchedule)
@pytest.mark.parametrize("stages", range(1, 9))
def test_any_number_of_micro_batches_works(schedule: PipelineSchedule, stages: int) -> None:
    parts = 3 if schedule is PipelineSchedule.interleaved else 1
    for micro_batches in range(1, 20):
        program = build(schedule, stages, micro_batches, parts, forward_only=True)
        check_structure(program, backward=False)
        timeline = execute(program)
        kinds = {event.op.kind for events in timeline.events for event in events}
        assert kinds <= {OpKind.recv_activation, OpKind.forward, OpKind.send_activation}


@pytest.mark.parametrize("stages", range(1, 9))
def test_the_way_back_costs_no_idle_time(stages: int) -> None:
    """The shortest there is: p - 1 chunks until the last stage starts, p - 1 after it has finished."""
    for micro_batches in range(1, 20):
        program = build(PipelineSchedule.dualpipev, stages, micro_batches, forward_only=True)
        assert execute(program).makespan == 2 * micro_batches + 2 * (stages - 1)


@pytest.mark.parametrize("micro_batches", [1, 3, 4, 7])
def test_plain_and_interleaved_fill_and_drain_once(micro_batches: int) -> None:
    plain = build(PipelineSchedule.one_f_one_b, 4, micro_batches, forward_only=True)
    assert execute(plain).makespan == micro_batches + 3
    # A last group that is not full leaves gaps, whole groups do not.
    interleaved = build(PipelineSchedule.interleaved, 4, 8, 2, forward_only=True)
    assert execute(interleaved).makespan == 8 * 2 + 3


def test_an_incomplete_last_group_goes_through_all_chunks() -> None:
    program = build(PipelineSchedule.interleaved, 2, 3, 2, forward_only=True)
    assert letters(program, 0) == letters(program, 1) == "F0.0 F1.0 F0.1 F1.1 F2.0 F2.1"
