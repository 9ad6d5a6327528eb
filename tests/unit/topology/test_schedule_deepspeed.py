"""Our DualPipeV runs the passes in DeepSpeed's order."""

from __future__ import annotations

import pytest

from engine.config.enums import PipelineSchedule
from engine.topology.program import COMPUTE
from engine.topology.schedule import build

Pass = tuple[str, int, int]


def deepspeed_order(stages: int, micro_batches: int, stage: int) -> list[Pass]:
    """Name, chunk and micro-batch of every pass; DeepSpeed's buffer number is phase * micro_batches + micro-batch."""
    from deepspeed.runtime.pipe.schedule import BackwardPass, DualPipeVSchedule, ForwardPass

    names = {ForwardPass: "forward", BackwardPass: "backward"}
    schedule = DualPipeVSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
    return [
        (names[type(op)], 2 * stages - 1 - stage if op.phase else stage, op.buffer_id % micro_batches)
        for step in schedule.steps()
        for op in step
        if type(op) in names
    ]


@pytest.mark.parametrize("stages", range(1, 9))
def test_dualpipev_is_deepspeeds(stages: int) -> None:
    for micro_batches in (2 * stages, 2 * stages + 1, 2 * stages + 6, 64):
        program = build(PipelineSchedule.dualpipev, stages, micro_batches)
        for stage, ops in enumerate(program.ops):
            ours = [(op.kind.value, op.chunk, op.micro_batch) for op in ops if op.kind in COMPUTE]
            assert ours == deepspeed_order(stages, micro_batches, stage)
