"""transformers' model under DeepSpeed as people write it: `deepspeed.initialize`, eager, bf16 with fp32 states.

python -m benchmarks.step.hf_deepspeed OUT.json [options of benchmarks.step.loop] [overrides]

ZeRO stage and offload of the optimizer are those of the overrides; all else is DeepSpeed's default.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.step import hf
from benchmarks.step.loop import Step, main, set_rate
from engine.config.enums import DType, Offload
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.batch import Batch


def make(cfg: Config, ctx: ParallelContext, variant: str) -> Step:
    """The loop of one rank; there are no variants."""
    import deepspeed

    # Only inference on CPUs calls it, and building it takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = hf.build(cfg, ctx.device)
    zero: dict[str, Any] = {"stage": cfg.zero.stage}
    if cfg.zero.offload_optimizer is Offload.none:
        optimizer = hf.optimizer_of(model.parameters(), cfg.optim, ctx.device)
    else:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optim = cfg.optim
        betas = (optim.beta1, optim.beta2)
        optimizer = DeepSpeedCPUAdam(model.parameters(), optim.lr, betas=betas, weight_decay=optim.weight_decay)
        zero["offload_optimizer"] = {"device": str(cfg.zero.offload_optimizer), "pin_memory": cfg.zero.pin_memory}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": cfg.train.micro_batch,
            "gradient_accumulation_steps": cfg.train.accum_steps,
            "gradient_clipping": cfg.optim.clip_norm,
            "bf16": {"enabled": cfg.precision.dtype is DType.bf16},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )

    def step(batches: list[Batch], lr: float) -> Tensor:
        set_rate(engine.optimizer, lr)
        total = torch.zeros((), device=ctx.device)
        for batch in batches:
            loss = engine(**hf.inputs(batch, cfg, ctx.device)).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / (len(batches) * ctx.dp.size)
        dist.all_reduce(total)
        return total

    return step


if __name__ == "__main__":
    main(sys.argv[1:], make)
