"""The few lines that say what a run is before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

import engine
from engine.config.derived import block_linears, fp8_linears, in_fp8
from engine.config.enums import Fp8
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.observe.progress import human_count
from engine.plan.costs import parameter_counts, total_parameters
from engine.runtime.graphs import EAGER, wants_graphs
from engine.topology.execution import execute
from engine.topology.schedule import build
from engine.train.kernels import Chosen


def describe(
    cfg: Config, ctx: ParallelContext, names: Sequence[str], bounds: Sequence[int], chosen: Chosen
) -> Iterator[str]:
    """Model and mesh; global batch; stages with their share of the parameters; kernels."""
    train, parallel, grid = cfg.train, cfg.parallel, ctx.grid
    shared = f" x context {grid.cp}" if grid.cp > 1 else ""
    where = torch.cuda.get_device_name(ctx.device) if ctx.device.type == "cuda" else "CPU"
    yield (
        f"Octant {engine.__version__}: {cfg.model.name}, {human_count(total_parameters(cfg.model))} parameters on "
        f"{grid.world_size} ranks = pp {grid.pp} x dp {grid.dp} x tp {grid.tp}{shared}, {where}"
    )
    most = "at most " if cfg.data.variable_length else ""
    samples = train.micro_batch * train.accum_steps * grid.dp
    yield (
        f"global batch {samples} = micro {train.micro_batch} x accum {train.accum_steps} x dp {grid.dp} samples of "
        f"{most}{cfg.data.seq_len} tokens = {most}{samples * cfg.data.seq_len:,} tokens; ZeRO-{cfg.zero.stage}, "
        f"{cfg.precision.dtype}, {cfg.optim.name}"
    )
    if grid.pp > 1:
        counts = parameter_counts(cfg.model)
        program = build(parallel.schedule, grid.pp, train.accum_steps, parallel.virtual_stages)
        for stage in range(grid.pp):
            parts = [names[bounds[chunk] : bounds[chunk + 1]] for chunk in program.chunks_of(stage)]
            size = human_count(sum(counts[name] for part in parts for name in part))
            where = ", ".join(f"{part[0]} .. {part[-1]}" for part in parts)
            yield f"stage {stage}: {where}, {sum(map(len, parts))} layers, {size} parameters"
        idle = execute(program).bubble
        yield (
            f"{parallel.schedule} with {train.accum_steps} micro-batches: bubble {idle:.0%} if stages are equal; "
            "more train.accum_steps shrink it"
        )
    if cfg.precision.fp8 is not Fp8.none:
        yield _fp8(cfg)
    yield from chosen.lines(ctx.device)
    if ctx.device.type == "cuda" and wants_graphs(cfg, ctx):
        yield f"cuda graphs: passes are recorded after {EAGER} of each kind; validation is launched kernel by kernel"


def _fp8(cfg: Config) -> str:
    """Which linears multiply in fp8, and which of them do not and why."""
    blocks = [block for block in range(cfg.model.num_layers) if in_fp8(cfg, block)]
    names, sizes = fp8_linears(cfg), block_linears(cfg.model, cfg.parallel.tp)
    wide = [f"{name} ({rows} x {columns})" for name, (rows, columns) in sizes.items() if name not in names]
    said = f"fp8 {cfg.precision.fp8}: {', '.join(name for name in sizes if name in names)} of blocks "
    said += f"{blocks[0]} to {blocks[-1]}"
    return f"{said}; in bf16, as their sizes are no multiples of 16: {', '.join(wide)}" if wide else said
