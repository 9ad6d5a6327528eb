"""What the timeline study makes of measured steps, and what it refuses."""

from __future__ import annotations

import pytest

from engine.config.enums import PipelineSchedule
from engine.errors import LaunchError
from engine.study import timeline
from engine.topology.execution import execute
from engine.topology.schedule import build

PROGRAM = build(PipelineSchedule.interleaved, 2, 4, 2)
FORWARD, BACKWARD = [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 5.0, 7.0]


def test_the_prediction_takes_each_chunks_median_and_free_messages() -> None:
    exact = execute(PROGRAM, FORWARD, BACKWARD)
    slow = execute(PROGRAM, [3 * s for s in FORWARD], [3 * s for s in BACKWARD], transfer_s=1.0)
    fast = execute(PROGRAM, [s / 2 for s in FORWARD], [s / 2 for s in BACKWARD], transfer_s=9.0)
    assert timeline.predict(PROGRAM, [slow, exact, fast]) == exact
    assert timeline.predict(PROGRAM, [exact, slow, slow]).makespan > exact.makespan


def test_the_typical_step_is_the_one_of_median_length() -> None:
    steps = [execute(PROGRAM, seconds, BACKWARD) for seconds in (1.0, 9.0, 2.0, 7.0, 8.0)]
    assert timeline.typical(steps) is steps[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["parallel=single"],
            "[OCT522] parallel.pp=1: one stage has no pipeline to look at. Use parallel.pp=2",
        ),
        (
            ["train.steps=2"],
            "[OCT522] train.steps=2: the first 2 steps are warm-up and not measured. Use train.steps=3",
        ),
    ],
)
def test_refused(words: list[str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        timeline.main(["model=gpt_tiny", "train.device=cpu", *words])
    assert message in str(caught.value)
