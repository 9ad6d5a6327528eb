"""torch.compile for the parts that repay it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config.enums import Switch
from engine.config.schema import Config
from engine.model.block import Block


def wants_compile(cfg: Config, device: torch.device) -> bool:
    """`auto` compiles on GPUs."""
    return device.type == "cuda" if cfg.kernels.compile is Switch.auto else cfg.kernels.compile is Switch.on


def compile_parts(model: nn.Module, loss: nn.Module, *, deterministic: bool, hooked: bool = False) -> None:
    """Compile every transformer block and the loss in place; names and parameters stay as they are.

    Args:
        hooked: the parts get hooks that must run outside of their graphs, as those of ZeRO-3.
        deterministic: take no kernel by its measured time: another process would take another one, with other sums.
    """
    options: dict[str, Any] = {"options": {"deterministic": True}} if deterministic else {}
    for module in model.modules():
        if isinstance(module, Block):
            (module.compile_forward if hooked else module.compile)(**options)
    if hooked:
        loss.forward = torch.compile(loss.forward, **options)  # type: ignore[method-assign]
    else:
        loss.compile(**options)
