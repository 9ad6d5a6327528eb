"""torch.compile for the parts that repay it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config.enums import Switch
from engine.config.schema import Config
from engine.model.block import Block


def wants_compile(cfg: Config, device: torch.device) -> bool:
    """`auto` compiles on GPUs, but not under ZeRO-3, whose hooks gather parameters inside the block."""
    if cfg.kernels.compile is Switch.auto:
        return device.type == "cuda" and cfg.zero.stage < 3
    return cfg.kernels.compile is Switch.on


def compile_parts(model: nn.Module, loss: nn.Module, *, deterministic: bool) -> None:
    """Compile every transformer block and the loss in place; names and parameters stay as they are.

    Args:
        deterministic: take no kernel by its measured time: another process would take another one, with other sums.
    """
    options: dict[str, Any] = {"options": {"deterministic": True}} if deterministic else {}
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(**options)
    loss.compile(**options)
