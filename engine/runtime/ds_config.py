"""From the typed config to DeepSpeed's dictionary. Batch sizes, clipping and ZeRO stage are always explicit.

DeepSpeed accepts a misspelt top-level key in silence and clips at 1.0 unless told otherwise.
"""

from __future__ import annotations

from typing import Any

from engine.config.derived import bucket_elements, has_own_stage3, offloads, streams
from engine.config.enums import DType, Offload, OffloadStrategy, OptimizerName
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.block import Block
from engine.optim.flat_adamw import FlatAdamW
from engine.plan.costs import block_parameters
from engine.runtime.offload import offload_config, selective_optimizer

_PREFETCHED, _LIVE = 50_000_000, 1_000_000_000
"""DeepSpeed's defaults, elements."""


def deepspeed_config(cfg: Config, ctx: ParallelContext) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Clipping is off where Octant clips itself: see `engine.runtime.gradients`.
    """
    train, zero = cfg.train, cfg.zero
    buckets = {"reduce_bucket_size": bucket_elements(cfg), "allgather_bucket_size": zero.bucket_elements}
    if zero.stage == 3:
        del buckets["allgather_bucket_size"]
    # One replica has nothing to send, but DeepSpeed has the host wait for the stream of the layer before.
    beside = zero.overlap_comm if has_own_stage3(cfg) else overlaps(cfg, ctx)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.accum_steps,
        "train_batch_size": train.micro_batch * train.accum_steps * ctx.reduce.size,
        "gradient_clipping": cfg.optim.clip_norm if clips_itself(cfg) else 0.0,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": beside and ctx.device.type == "cuda",
            "contiguous_gradients": not has_own_stage3(cfg),
            **buckets,
            **offload_config(cfg, ctx),
        },
        # SGD and torch's fused optimizers are elementwise, which is all that ZeRO asks of an optimizer.
        "zero_allow_untested_optimizer": True,
        **_precision(cfg),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would wait for the device before every pass and after it, from the third step on.
        "timers": {"throughput": {"enabled": False}},
    }
    if zero.stage == 3:
        config["zero_optimization"] |= _whole_blocks(cfg)
    if offloads(cfg):
        config["zero_force_ds_cpu_optimizer"] = cfg.optim.name is OptimizerName.adamw
    if zero.offload_strategy is OffloadStrategy.zenflow:
        config["optimizer"] = selective_optimizer(cfg)
    if ctx.pp.size > 1:
        # The pipeline runner says itself when a step's gradients are complete.
        config["managed_gradient_accumulation"] = False
    config.update(cfg.runtime.deepspeed_extra)
    return config


def _whole_blocks(cfg: Config) -> dict[str, Any]:
    """A block's parameters are gathered as one, where a compiled graph or all its tiles find them.

    The next block is gathered meanwhile: DeepSpeed's own limits would take a part of it, or nothing of a large one.
    """
    cut, whole = block_parameters(cfg.model)
    block = cut // cfg.parallel.tp + whole
    return {
        "leaf_module": {"classes": [Block.__name__]},
        "stage3_prefetch_bucket_size": max(block, _PREFETCHED),
        "stage3_max_live_parameters": max(3 * block, _LIVE),
    }


def _precision(cfg: Config) -> dict[str, Any]:
    """Number formats. fp16 gradients are added up in fp32, and an overflow halves the scale at once."""
    precision = cfg.precision
    if precision.dtype is DType.bf16:
        bf16 = {"enabled": True, "immediate_grad_update": has_flat_state(cfg)}
        sums = DType.fp32 if has_flat_state(cfg) else precision.grad_accum
        return {"bf16": bf16, "data_types": {"grad_accum_dtype": str(sums)}}
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


def overlaps(cfg: Config, ctx: ParallelContext) -> bool:
    """Whether gradients are reduced while the backward pass goes on."""
    return cfg.zero.overlap_comm and ctx.pp.size == 1 and ctx.reduce.size > 1


def has_flat_state(cfg: Config) -> bool:
    """Whether `engine.runtime.flat` holds the state: where DeepSpeed has its `BF16_Optimizer`, and with a stream."""
    ours = cfg.zero.offload_optimizer is Offload.none or streams(cfg)
    return cfg.precision.dtype is DType.bf16 and cfg.zero.stage == 1 and ours


def sums_in_bf16(cfg: Config, ctx: ParallelContext, optimizer: object) -> bool:
    """Whether gradients are added up in bf16: as asked, and where it is exact since a step has one gradient.

    For the second the optimizer has to read bf16 gradients beside fp32 weights.
    """
    single = cfg.train.accum_steps == ctx.reduce.size == ctx.pp.size == 1
    return cfg.precision.grad_accum is DType.bf16 or (single and isinstance(optimizer, FlatAdamW))


def clips_itself(cfg: Config) -> bool:
    """Whether DeepSpeed clips by the global norm on its own, correctly in every layout.

    Without ZeRO it does not: its norm leaves out replicated parameters of later pipeline stages, counts a
    tied weight once per stage, and is not reported.
    """
    return cfg.zero.stage > 0
