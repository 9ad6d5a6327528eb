"""What rank 0 says of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.protocols import StepResult
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
    hook.after_step(1, StepResult(loss=torch.tensor(2.0), grad_norm=torch.tensor(1.0)), 0.1)
    (row,) = sink.rows
    assert {"loss", "grad_norm", "lr", "step_s"} <= row.keys()
    assert ("tokens" in row, "tokens_per_s" in row) == (not variable, not variable)
