"""Parameter groups and the optimizer over them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from engine.config.enums import OptimizerName
from engine.config.schema import OptimConfig
from engine.parallel.logical import logical_of


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices and embeddings, decayed; norms and biases, not. Empty groups are left out."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if logical_of(parameter).decay else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    parameters: Iterable[nn.Parameter], cfg: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of `cfg` (AdamW arXiv 1711.05101, or SGD with momentum), fused on GPUs."""
    groups = parameter_groups(parameters, cfg.weight_decay)
    fused = device.type == "cuda"
    if cfg.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=fused)
