"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any, Protocol

from engine.config.derived import cooldown_steps, warmup_steps
from engine.config.enums import ScheduleName
from engine.config.schema import OptimConfig


class HasGroups(Protocol):
    """An optimizer, or DeepSpeed's wrapper of one."""

    @property
    def param_groups(self) -> Any: ...


def set_learning_rate(optimizer: HasGroups, lr: float) -> None:
    """Step with `lr` from now on: each parameter group with its `lr_scale` times that."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """The rate used at `step` (from 0): linear warm-up to `lr`, then the schedule.

    `cosine` and `linear` reach `lr * min_lr_ratio` at `decay_steps` and stay there. `wsd` (arXiv 2404.06395) stays at
    `lr` and falls linearly to the same value in the last `cooldown_steps` before `decay_steps`. `inverse_sqrt`
    (arXiv 1706.03762, section 5.3; T5, arXiv 1910.10683, section 3.1.2) is lr * sqrt(w / (w + step - warmup)) with
    w = max(1, warmup): after a warm-up lr * sqrt(warmup / step), without one lr / sqrt(step + 1). `constant` and
    `inverse_sqrt` have no floor.
    """
    warmup = warmup_steps(cfg, total_steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule is ScheduleName.constant:
        return cfg.lr
    if cfg.schedule is ScheduleName.inverse_sqrt:
        unit = max(1, warmup)
        return cfg.lr * math.sqrt(unit / (unit + step - warmup))
    end = cfg.decay_steps or total_steps
    start = max(warmup, end - cooldown_steps(cfg, total_steps)) if cfg.schedule is ScheduleName.wsd else warmup
    done = 1.0 if step >= end else max(0.0, (step - start) / max(1, end - start))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if cfg.schedule is ScheduleName.cosine else 1.0 - done
    return cfg.lr * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * left)
