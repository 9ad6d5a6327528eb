"""From the typed config to DeepSpeed's dictionary. Batch sizes, clipping and ZeRO stage are always explicit.

DeepSpeed accepts a misspelt top-level key in silence and clips at 1.0 unless told otherwise.
"""

from __future__ import annotations

from typing import Any

from engine.config.enums import DType, OffloadStrategy, OptimizerName
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.runtime.offload import offload_config, offloads, selective_optimizer


def deepspeed_config(cfg: Config, ctx: ParallelContext) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Clipping is off where Octant clips itself: see `engine.runtime.gradients`.
    """
    train, zero = cfg.train, cfg.zero
    buckets = {"reduce_bucket_size": zero.bucket_elements, "allgather_bucket_size": zero.bucket_elements}
    if zero.stage == 3:
        del buckets["allgather_bucket_size"]
    overlap = zero.overlap_comm and ctx.device.type == "cuda" and ctx.pp.size == 1 and ctx.reduce.size > 1
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.accum_steps,
        "train_batch_size": train.micro_batch * train.accum_steps * ctx.reduce.size,
        "gradient_clipping": cfg.optim.clip_norm if clips_itself(cfg) else 0.0,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": overlap,
            "contiguous_gradients": True,
            **buckets,
            **offload_config(cfg, ctx),
        },
        # SGD and torch's fused optimizers are elementwise, which is all that ZeRO asks of an optimizer.
        "zero_allow_untested_optimizer": True,
        **_precision(cfg),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if offloads(cfg):
        config["zero_force_ds_cpu_optimizer"] = cfg.optim.name is OptimizerName.adamw
    if zero.offload_strategy is OffloadStrategy.zenflow:
        config["optimizer"] = selective_optimizer(cfg)
    if ctx.pp.size > 1:
        # The pipeline runner says itself when a step's gradients are complete.
        config["managed_gradient_accumulation"] = False
    config.update(cfg.runtime.deepspeed_extra)
    return config


def _precision(cfg: Config) -> dict[str, Any]:
    """Number formats. fp16 gradients are added up in fp32, and an overflow halves the scale at once."""
    precision = cfg.precision
    if precision.dtype is DType.bf16:
        return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": str(precision.grad_accum)}}
    if precision.dtype is DType.fp16:
        scale = {
            "loss_scale": precision.loss_scale or 0,
            "initial_scale_power": precision.initial_scale_power,
            "loss_scale_window": precision.scale_window,
            "hysteresis": 1,
            "min_loss_scale": 1,
        }
        return {"fp16": {"enabled": True, **scale}, "data_types": {"grad_accum_dtype": str(DType.fp32)}}
    return {"bf16": {"enabled": False}}


def clips_itself(cfg: Config) -> bool:
    """Whether DeepSpeed clips by the global norm on its own, correctly in every layout.

    Without ZeRO it does not: its norm leaves out replicated parameters of later pipeline stages, counts a
    tied weight once per stage, and is not reported.
    """
    return cfg.zero.stage > 0
