"""The only package that knows DeepSpeed. `build` gives an `Engine` for any legal layout; `reference` is the oracle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.model.layers import InitialWeights, LayerDef
from engine.observe.log import captured_output

if TYPE_CHECKING:
    from engine.protocols import Engine
    from engine_kernels.ops import AdamWFn


def build(
    layers: Sequence[LayerDef],
    bounds: Sequence[int],
    initial: InitialWeights,
    cfg: Config,
    ctx: ParallelContext,
    adamw_step: AdamWFn | None = None,
) -> Engine:
    """The engine of this rank: its slice of the model, its optimizer and the schedule. Collective.

    Args:
        layers: the whole model.
        bounds: first layer of each pipeline stage, then the number of layers.
        initial: value of each logical tensor at the start.
        cfg: checked configuration.
        ctx: this rank's place; the process group exists.
        adamw_step: computes AdamW instead of torch.
    """
    # DeepSpeed picks its accelerator at import; without a word from us it guesses, and prints the guess.
    os.environ["DS_ACCELERATOR"] = ctx.device.type
    with captured_output(keep=cfg.logging.verbose):
        if cfg.parallel.pp > 1:
            from engine.runtime.pipeline import PipelineRunner

            return PipelineRunner(layers, bounds, initial, cfg, ctx, adamw_step)
        from engine.runtime.zero import ZeroRunner

        return ZeroRunner(layers, initial, cfg, ctx, adamw_step)
