"""A small configuration to change one option at a time of."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from engine.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainingConfig


def make(**changes: Any) -> Config:
    """A config that breaks no rule on one rank, with `section__option=value` changed."""
    cfg = Config(
        model=ModelConfig(name="m", num_layers=4, hidden_size=48, num_heads=6, vocab_size=512, max_positions=64),
        data=DataConfig(source="python", seq_len=32, vocab_size=512),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        train=TrainingConfig(steps=10, micro_batch=2),
        run=RunConfig(name="test"),
    )
    for path, value in changes.items():
        sections, option = path.rsplit("__", 1)
        setattr(attrgetter(sections.replace("__", "."))(cfg), option, value)
    return cfg
