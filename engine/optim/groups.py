"""Parameter groups and the optimizer over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from engine.config.enums import OptimizerName
from engine.config.schema import OptimConfig
from engine.dist.context import ParallelContext
from engine.optim.adafactor import Adafactor
from engine.optim.flat_adamw import FlatAdamW
from engine.optim.lamb import Lamb
from engine.optim.lion import Lion
from engine.optim.muon import Muon
from engine.optim.mup import lr_scale
from engine.parallel.logical import logical_of
from engine_kernels.ops import AdamWFn


def parameter_groups(
    parameters: Iterable[nn.Parameter], cfg: OptimConfig, width_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of `weight_decay`, `lr_scale` (muP) and, for muon, `orthogonal`; decayed ones first.

    Matrices and embeddings are decayed; norms and biases are not. `width_ratio` as in `engine.config.derived`.
    """
    muon = cfg.name is OptimizerName.muon
    found: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        logical = logical_of(parameter)
        scale = lr_scale(cfg.name, logical.role, width_ratio)
        found.setdefault((logical.decay, muon and logical.role == "matrix", scale), []).append(parameter)
    return [
        {
            "params": found[key],
            "weight_decay": cfg.weight_decay if key[0] else 0.0,
            "lr": cfg.lr * key[2],
            "lr_scale": key[2],
            **({"orthogonal": key[1]} if muon else {}),
        }
        for key in sorted(found, reverse=True)
    ]


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    cfg: OptimConfig,
    ctx: ParallelContext,
    *,
    width_ratio: float = 1.0,
    adamw_step: AdamWFn | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of `cfg`. AdamW (arXiv 1711.05101) and SGD with momentum are torch's, fused on GPUs.

    Where another tool replaces the parameters by flat tensors, lamb, muon and adafactor are told what these hold
    (`LogicalOptimizer.attach`) before the first step. Set the rate with `engine.optim.schedule.set_learning_rate`.

    Args:
        parameters: all parameters of this rank's stage.
        ctx: gives the device, and the ranks that share a logical tensor.
        width_ratio: m of muP, from `engine.config.derived.width_ratio`.
        adamw_step: computes AdamW instead of torch.
    """
    groups = parameter_groups(parameters, cfg, width_ratio)
    fused, betas = ctx.device.type == "cuda", (cfg.beta1, cfg.beta2)
    match cfg.name:
        case OptimizerName.adamw if adamw_step is not None:
            return FlatAdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, update=adamw_step)
        case OptimizerName.adamw:
            return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=fused)
        case OptimizerName.sgd:
            return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=fused)
        case OptimizerName.lion:
            return Lion(groups, lr=cfg.lr, betas=betas)
        case OptimizerName.lamb:
            return Lamb(groups, ctx, lr=cfg.lr, betas=betas, eps=cfg.eps)
        case OptimizerName.adafactor:
            return Adafactor(groups, ctx, lr=cfg.lr)
        case OptimizerName.muon:
            return Muon(groups, ctx, lr=cfg.lr, momentum=cfg.momentum or 0.95, betas=betas, eps=cfg.eps)
