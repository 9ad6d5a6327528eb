"""The few lines that say what a run is before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

import engine
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.observe.progress import human_count
from engine.plan.costs import parameter_counts, total_parameters
from engine.topology.schedule import simulate
from engine_kernels.registry import Choice


def describe(
    cfg: Config, ctx: ParallelContext, names: Sequence[str], bounds: Sequence[int], attention: Choice
) -> Iterator[str]:
    """Model and mesh; global batch; stages with their share of the parameters; kernels."""
    train, grid = cfg.train, ctx.grid
    where = torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "CPU"
    yield (
        f"Octant {engine.__version__}: {cfg.model.name}, {human_count(total_parameters(cfg.model))} parameters on "
        f"{grid.world_size} ranks = pp {grid.pp} x dp {grid.dp} x tp {grid.tp}, {where}"
    )
    samples = train.micro_batch * train.accum_steps * grid.dp
    yield (
        f"global batch {samples} = micro {train.micro_batch} x accum {train.accum_steps} x dp {grid.dp} samples of "
        f"{cfg.data.seq_len} tokens = {samples * cfg.data.seq_len:,} tokens; ZeRO-{cfg.zero.stage}, "
        f"{cfg.precision.dtype}, {cfg.optim.name}"
    )
    if grid.pp > 1:
        counts = parameter_counts(cfg.model)
        for stage in range(grid.pp):
            part = names[bounds[stage] : bounds[stage + 1]]
            size = human_count(sum(counts[name] for name in part))
            yield f"stage {stage}: {part[0]} .. {part[-1]}, {len(part)} layers, {size} parameters"
        idle = simulate(grid.pp, train.accum_steps).bubble
        yield f"1F1B with {train.accum_steps} micro-batches: bubble {idle:.0%}; more train.accum_steps shrink it"
    yield str(attention)
