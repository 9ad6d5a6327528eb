"""What rank 0 says of a step."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

from engine.protocols import StepResult
from engine.train import hooks
from engine.train.hooks import Metrics
from tests.helpers.configs import make


class Rows:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("variable", [False, True])
def test_speed_is_said_where_the_tokens_are_known(variable: bool) -> None:
    base = make()
    cfg = replace(base, data=replace(base.data, variable_length=variable))
    sink = Rows()
    hook = Metrics(cfg, 1, sink, 64, torch.device("cpu"))
    hook.before_training()
    hook.after_step(1, StepResult(loss=torch.tensor(2.0), grad_norm=torch.tensor(1.0)), 0.1, 0.0)
    (row,) = sink.rows
    assert {"loss", "grad_norm", "lr", "step_s", "data_wait_s"} <= row.keys()
    assert ("tokens" in row, "tokens_per_s" in row) == (not variable, not variable)


def test_waiting_for_data_is_a_mean_over_the_steps_of_a_line_and_a_share_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = count()
    # Looked at once before training and once for each line: a second passes between two looks.
    monkeypatch.setattr(hooks.time, "perf_counter", lambda: float(next(clock)))
    sink = Rows()
    hook = Metrics(make(train__steps=3, logging__every=2), 1, sink, 64, torch.device("cpu"))
    hook.before_training()
    for step, waited in ((1, 0.1), (2, 0.3), (3, 0.2)):
        hook.after_step(step, StepResult(loss=torch.tensor(2.0), grad_norm=torch.tensor(1.0)), 0.1, waited)
    assert [row["step_s"] for row in sink.rows] == [0.5, 1.0]
    assert [row["data_wait_s"] for row in sink.rows] == [pytest.approx(0.2), pytest.approx(0.2)]
    summary: dict[str, Any] = {}
    hook.after_training(summary)
    assert summary["data_wait_share"] == pytest.approx(0.6 / 2)
    assert summary["data_wait_s"] == pytest.approx(0.2)
