"""The base of hooks."""

from __future__ import annotations

from typing import Any

from engine.protocols import StepResult


class Quiet:
    """A hook that does nothing; hooks override what they need."""

    def before_training(self) -> None:
        pass

    def after_step(self, step: int, result: StepResult, lr: float, data_wait_s: float) -> None:
        pass

    def after_training(self, summary: dict[str, Any]) -> None:
        pass

    def after_stop(self, step: int) -> None:
        pass
