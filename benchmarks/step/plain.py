"""The plain PyTorch loop that Octant is measured against: same model, same weights, same tokens, no DeepSpeed.

python -m benchmarks.step.plain OUT.json [--variant blocks|whole] [options of benchmarks.step.loop] [overrides]

Weights, gradients and both moments in `precision.dtype`, torch's fused AdamW, torch's clipping, gradients added up in
place; blocks and loss compiled, or model and loss as one graph. What one would write by hand for one GPU, with the
kernels that `engine.train` takes there; several GPUs hold a replica each.
"""

from __future__ import annotations

import sys

from benchmarks.step.loop import Step, TorchLoop, main
from engine.config.derived import width_ratio
from engine.config.enums import Switch
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.dist.init import DTYPES
from engine.model.build import ModelWithLoss, build_layers, build_loss
from engine.model.layers import build_stacks, random_weights
from engine.optim.groups import build_optimizer
from engine.runtime.compile import compile_parts
from engine.runtime.steps import make_feeds, recomputation
from engine.train.kernels import choose_kernels


def make(cfg: Config, ctx: ParallelContext, variant: str) -> Step:
    """The loop of one rank; `variant` as in the command."""
    layers = build_layers(cfg, ctx, choose_kernels(cfg, ctx.device).kernels)
    dtype = DTYPES[cfg.precision.dtype]
    (model,) = build_stacks(
        layers,
        [(0, len(layers))],
        random_weights(cfg.train.seed),
        tp=ctx.tp,
        **recomputation(cfg),
        convert=lambda module: module.to(ctx.device, dtype),
    )
    optimizer = build_optimizer(model.parameters(), cfg.optim, ctx, width_ratio=width_ratio(cfg.model))
    module = ModelWithLoss(model, build_loss(cfg, ctx))
    wanted = cfg.kernels.compile is Switch.on or (cfg.kernels.compile is Switch.auto and ctx.device.type == "cuda")
    if wanted and variant == "whole":
        module.compile()
    elif wanted:
        compile_parts(model, module.loss, deterministic=cfg.kernels.deterministic)
    return TorchLoop(module, optimizer, lambda batches: make_feeds(batches, cfg, ctx), cfg, ctx)


if __name__ == "__main__":
    main(sys.argv[1:], make)
