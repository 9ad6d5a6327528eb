"""The training loop. Everything beside the step itself is a hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from engine.config.derived import sequence_multiple
from engine.config.schema import Config
from engine.data import Data
from engine.optim.schedule import learning_rate
from engine.protocols import Engine, StepResult


class Hook(Protocol):
    """Called on every rank, in the order of the list, so that a hook may use collectives."""

    def before_training(self) -> None:
        """Before the first step."""

    def after_step(self, step: int, result: StepResult, lr: float) -> None:
        """After step number `step` (from 1)."""

    def after_training(self, summary: dict[str, Any]) -> None:
        """After the last step; may add to the summary."""


def fit(engine: Engine, data: Data, cfg: Config, hooks: Sequence[Hook]) -> dict[str, Any]:
    """Train for `cfg.train.steps` steps and return the summary that the hooks filled."""
    train, dp, multiple = cfg.train, engine.ctx.dp, sequence_multiple(cfg.parallel)
    for hook in hooks:
        hook.before_training()
    for step in range(train.steps):
        batches = data.train.micro_batches(
            step,
            dp_rank=dp.rank,
            dp=dp.size,
            micro_batch=train.micro_batch,
            accum_steps=train.accum_steps,
            multiple=multiple,
        )
        lr = learning_rate(cfg.optim, step, train.steps)
        result = engine.train_step(batches, lr)
        for hook in hooks:
            hook.after_step(step + 1, result, lr)
    summary: dict[str, Any] = {}
    for hook in hooks:
        hook.after_training(summary)
    return summary
