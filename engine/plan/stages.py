"""Which layers stand on which pipeline rank, from the config alone."""

from __future__ import annotations

from itertools import pairwise

from engine.config.derived import parts_per_rank
from engine.config.enums import Balance, PipelineSchedule
from engine.config.schema import Config
from engine.plan.costs import GLUED, layer_costs, parameter_counts
from engine.topology.partition import even_out, partition


def stage_bounds(cfg: Config) -> tuple[int, ...]:
    """Chunk k holds layers `bounds[k]` to `bounds[k + 1]` (exclusive) of `parameter_counts`; there are pp * parts.

    A glued layer stays with the one before it. Raises `TopologyError` (213): more chunks than layers.
    """
    names = list(parameter_counts(cfg.model))
    costs = layer_costs(cfg.model, cfg.parallel.balance, cfg.data.seq_len)
    glued = GLUED if "head.transform" in names else frozenset()
    starts = [index for index, name in enumerate(names) if name not in glued] + [len(names)]
    merged = [sum(costs[start:end]) for start, end in pairwise(starts)]
    bounds = partition(merged, cfg.parallel.pp * parts_per_rank(cfg.parallel))
    if cfg.parallel.balance is Balance.flops:
        bounds = even_out(merged, bounds, chunk_owners(cfg))
    return tuple(starts[bound] for bound in bounds)


def chunks(cfg: Config) -> list[tuple[str, ...]]:
    """Layer names of each chunk, along the model."""
    names = list(parameter_counts(cfg.model))
    return [tuple(names[start:end]) for start, end in pairwise(stage_bounds(cfg))]


def chunk_owners(cfg: Config) -> list[int]:
    """The pipeline rank of each chunk: chunk c is on c % pp, but dualpipev comes back on the ranks it went down."""
    pp = cfg.parallel.pp
    count = pp * parts_per_rank(cfg.parallel)
    if cfg.parallel.schedule is PipelineSchedule.dualpipev:
        return [min(chunk, count - 1 - chunk) for chunk in range(count)]
    return [chunk % pp for chunk in range(count)]


def layers_of(cfg: Config, stage: int) -> list[str]:
    """Layers on pipeline rank `stage`, in the order of the model."""
    return [
        name for names, owner in zip(chunks(cfg), chunk_owners(cfg), strict=True) if owner == stage for name in names
    ]
