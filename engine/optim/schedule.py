"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from engine.config.derived import warmup_steps
from engine.config.enums import ScheduleName
from engine.config.schema import OptimConfig


def learning_rate(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """The rate used at `step` (from 0): linear warm-up, then the schedule down to `lr * min_lr_ratio`, then flat."""
    warmup = warmup_steps(cfg, total_steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule is ScheduleName.constant:
        return cfg.lr
    end = cfg.decay_steps or total_steps
    done = min(1.0, (step - warmup) / max(1, end - warmup))
    left = 1.0 - done if cfg.schedule is ScheduleName.linear else 0.5 * (1.0 + math.cos(math.pi * done))
    return cfg.lr * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * left)
