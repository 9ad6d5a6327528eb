"""From the typed config to DeepSpeed's dictionary. Batch sizes, clipping and ZeRO stage are always explicit.

DeepSpeed accepts a misspelt top-level key in silence and clips at 1.0 unless told otherwise.
"""

from __future__ import annotations

from typing import Any

from engine.config.enums import DType
from engine.config.schema import Config
from engine.dist.context import ParallelContext


def deepspeed_config(cfg: Config, ctx: ParallelContext) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Clipping is off where Octant clips itself: see `engine.runtime.gradients`.
    """
    train, zero = cfg.train, cfg.zero
    bf16 = cfg.precision.dtype is DType.bf16
    buckets = {"reduce_bucket_size": zero.bucket_elements, "allgather_bucket_size": zero.bucket_elements}
    if zero.stage == 3:
        del buckets["allgather_bucket_size"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.accum_steps,
        "train_batch_size": train.micro_batch * train.accum_steps * ctx.dp.size,
        "gradient_clipping": cfg.optim.clip_norm if clips_itself(cfg) else 0.0,
        "zero_optimization": {
            "stage": zero.stage,
            "overlap_comm": zero.overlap_comm and ctx.device.type == "cuda" and ctx.pp.size == 1 and ctx.dp.size > 1,
            "contiguous_gradients": True,
            **buckets,
        },
        # SGD and torch's fused optimizers are elementwise, which is all that ZeRO asks of an optimizer.
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if bf16:
        config["data_types"] = {"grad_accum_dtype": str(cfg.precision.grad_accum)}
    if ctx.pp.size > 1:
        # Cutting stage-to-stage activations over tp saves traffic between hosts but costs an all-gather per transfer.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0}
    config.update(cfg.runtime.deepspeed_extra)
    return config


def clips_itself(cfg: Config) -> bool:
    """Whether DeepSpeed clips by the global norm on its own, correctly in every layout.

    Without ZeRO it does not: its norm leaves out replicated parameters of later pipeline stages, counts a
    tied weight once per stage, and is not reported.
    """
    return cfg.zero.stage > 0
