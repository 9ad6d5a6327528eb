"""ZeRO-Offload (arXiv 2101.06840): steps in host memory, where ZeRO then keeps optimizer state and fp32 weights."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, ZenFlowCPUAdam
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from engine.config.derived import offload_share, offloads, streams, width_ratio
from engine.config.enums import DType, Offload, OffloadStrategy, OptimizerName
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.optim.groups import build_optimizer, parameter_groups
from engine.optim.lion import Lion
from engine.optim.schedule import set_learning_rate
from engine.runtime import extensions
from engine_kernels.ops import AdamWFn
from engine_kernels.reference.adamw import adamw_step as reference_adamw


def make_optimizer(
    parameters: Iterable[nn.Parameter], cfg: Config, ctx: ParallelContext, adamw_step: AdamWFn | None = None
) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps: `build_optimizer`'s, or the one for host memory."""
    if offloads(cfg):
        return _host_optimizer(parameters, cfg)
    if (cfg.precision.states is DType.bf16 or streams(cfg)) and adamw_step is None:
        adamw_step = reference_adamw
    return build_optimizer(parameters, cfg.optim, ctx, width_ratio=width_ratio(cfg.model), adamw_step=adamw_step)


def _host_optimizer(parameters: Iterable[nn.Parameter], cfg: Config) -> torch.optim.Optimizer:
    """The optimizer of `cfg.optim` for tensors in host memory, with the groups of `build_optimizer`.

    AdamW is DeepSpeed's vectorised one, with fp32 state.
    """
    extensions.require(cfg)
    optim = cfg.optim
    groups = parameter_groups(parameters, optim, width_ratio(cfg.model))
    betas = (optim.beta1, optim.beta2)
    if optim.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    if optim.name is OptimizerName.lion:
        # DeepSpeed's has a second moment that it never reads, and would be compiled at the start of the run.
        return Lion(groups, lr=optim.lr, betas=betas)
    kind = DeepSpeedCPUAdam
    if cfg.zero.offload_strategy is OffloadStrategy.zenflow:
        kind = partial(ZenFlowCPUAdam, overlap_step=True)
    adam: torch.optim.Optimizer = kind(
        groups, lr=optim.lr, betas=betas, eps=optim.eps, adamw_mode=True, fp32_optimizer_states=True
    )
    return adam


def offload_config(cfg: Config, ctx: ParallelContext) -> dict[str, Any]:
    """The offload keys of DeepSpeed's `zero_optimization`; empty without offload.

    Memory is page-locked only where a GPU copies from it.
    """
    zero = cfg.zero
    pin = zero.pin_memory and ctx.device.type == "cuda"
    keys: dict[str, Any] = {}
    if offloads(cfg):
        keys["offload_optimizer"] = _place(cfg, zero.offload_optimizer, pin=pin)
        if zero.stage == 3 and zero.offload_optimizer is Offload.cpu:
            keys["offload_optimizer"]["ratio"] = offload_share(cfg)
    if zero.offload_params is not Offload.none:
        keys["offload_param"] = _place(cfg, zero.offload_params, pin=pin)
    if zero.offload_strategy is OffloadStrategy.superoffload:
        keys["offload_optimizer"]["super_offload"] = True
    if zero.offload_strategy is OffloadStrategy.zenflow:
        # Counted in micro-batches. DeepSpeed takes the update interval for the number of accumulation steps.
        keys["zenflow"] = {
            "topk_ratio": 0.1,
            "select_strategy": "step",
            "select_interval": 16 * cfg.train.accum_steps,
            "update_interval": cfg.train.accum_steps,
            "overlap_step": True,
        }
    return keys


def selective_optimizer(cfg: Config) -> dict[str, Any]:
    """DeepSpeed's `optimizer` section for ZenFlow, which steps the important columns with it on the GPU."""
    optim = cfg.optim
    parameters = {"lr": optim.lr, "betas": [optim.beta1, optim.beta2], "eps": optim.eps}
    return {"type": "AdamW", "params": {**parameters, "weight_decay": optim.weight_decay}}


def set_rate(optimizer: Any, lr: float) -> None:
    """`set_learning_rate` of a DeepSpeed optimizer, also of the part that `zero.offload_ratio` leaves on the GPU.

    DeepSpeed steps that with a second optimizer, whose first group has a rate of its own that nobody else sets.
    """
    set_learning_rate(optimizer, lr)
    on_device = getattr(optimizer, "backup_optimizer", None)
    if on_device is not None:
        for group, twin in zip(optimizer.param_groups, on_device.param_groups, strict=True):
            twin["lr"] = group["lr"]


def begin_step(optimizer: object) -> None:
    """Before the first backward pass of a step: forget the gradients of the step before.

    DeepSpeed's offloading ZeRO 1 and 2 keep two kinds. After an overflow, the fp32 sum on the device, so that every
    later step would overflow. And sums in host memory, to which each pass from the second of a step on is added: a
    parameter whose first pass of the step is a later one (of another part of the model on a pipeline stage, or a tied
    weight's) would find the step before there.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or not optimizer.cpu_offload:
        return
    if optimizer.overflow:
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))
    optimizer._wait_for_offload_copies()
    for gradient in optimizer.accumulated_grads_in_cpu.values():
        gradient.zero_()


def _place(cfg: Config, where: Offload, *, pin: bool) -> dict[str, Any]:
    disk = {"nvme_path": cfg.zero.nvme_path} if where is Offload.nvme else {}
    return {"device": str(where), "pin_memory": pin, **disk}
