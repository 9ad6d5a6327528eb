"""`python -m engine.plan [--world N] [--per-host N] [overrides]`: what training would refuse, or what it would hold."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields

from engine.config import entry, rules
from engine.config.batch import is_auto, replicas
from engine.config.hardware import stated_bytes
from engine.config.load import load
from engine.config.schema import Config
from engine.plan.costs import total_parameters
from engine.plan.fit import budget_bytes, predicted, report, settle_offload, sizes
from engine.plan.host import GIB, available_bytes, host_bytes, input_bytes, snapshot_bytes
from engine.plan.memory import Memory, memory, rank_parameters, step_timeline
from engine.plan.stages import chunk_owners, chunks
from engine.topology.grid import Grid

_USAGE = """\
usage: python -m engine.plan [--world N] [--per-host N] [group=choice ...] [section.option=value ...]

  --world N     ranks (default: one replica, or parallel.dp of them)
  --per-host N  ranks of one host (default: 8, or all where there are fewer)
  hardware=h200 (or another preset) says whether it fits, with how much room, and which recomputation it takes

The other words are those of training:
"""


def main(argv: list[str]) -> int:
    """Exit code: 0 the plan is on stdout, 2 refused (as training refuses, on stderr), 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m engine.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--world", type=_ranks)
    parser.add_argument("--per-host", type=_ranks, default=8)
    flags, words = parser.parse_known_args(argv)
    return entry.run(lambda: _plan(words, flags.world, flags.per_host), usage=_USAGE)


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of ranks, 1 or more")
    return int(text)


def _plan(words: list[str], world: int | None, per_host: int) -> int:
    cfg = load(words)
    parallel = cfg.parallel
    if world is None:
        world = parallel.pp * parallel.context * parallel.tp * (parallel.dp or 1)
    for line in _chosen(cfg, world):
        print(line)
    rules.require(cfg, world)
    stated = stated_bytes(cfg.hardware)
    if stated is not None and (said := settle_offload(cfg, world, budget_bytes(cfg.hardware, stated))):
        print(said)
    for line in plan(cfg, Grid.from_config(parallel, world), min(per_host, world)):
        print(line)
    return 0


def _chosen(cfg: Config, world: int) -> Iterator[str]:
    """Put what the plan expects of `train.micro_batch=auto` in its place, where the memory of the device is stated."""
    memory_bytes = stated_bytes(cfg.hardware)
    among = sizes(cfg, world, cpu=cfg.hardware.name == "cpu") if is_auto(cfg) and replicas(cfg.parallel, world) else []
    if memory_bytes is not None and among:
        size = predicted(cfg, world, among, budget_bytes(cfg.hardware, memory_bytes))
        cfg.train.micro_batch = size
        yield f"train.micro_batch=auto: by the plan {size} of {', '.join(map(str, among))}; training tries"


def plan(cfg: Config, grid: Grid, local_ranks: int) -> Iterator[str]:
    """The layout, the schedule, a table with a row for each pipeline rank, and what is taken of each host's memory."""
    train = cfg.train
    axes = (("pp", grid.pp), ("dp", grid.dp), ("cp", grid.cp), ("tp", grid.tp))
    mesh = " x ".join(f"{axis} {degree}" for axis, degree in axes)
    samples = train.micro_batch * train.accum_steps * grid.dp
    yield f"{cfg.model.name}: {total_parameters(cfg.model):,} parameters on {grid.world_size} ranks = {mesh}"
    yield f"global batch: {samples} samples = {samples * cfg.data.seq_len:,} tokens; ZeRO-{cfg.zero.stage}"
    if grid.pp > 1:
        idle = step_timeline(cfg).bubble
        yield f"{cfg.parallel.schedule} with {train.accum_steps} micro-batches: bubble {idle:.1%}"
    yield from _table(cfg, grid)
    yield from report(cfg, grid.world_size, cfg.hardware)
    needs = {
        "offload": max(host_bytes(cfg, grid.world_size, local_ranks)),
        "inputs of recomputed groups": max(input_bytes(cfg, grid.world_size, local_ranks)),
        "checkpoints": max(snapshot_bytes(cfg, grid.world_size, local_ranks)),
    }
    parts = ", ".join(f"{size / GIB:.3f} GiB of {what}" for what, size in needs.items() if size)
    if parts:
        free, stated = available_bytes(), cfg.hardware.host_memory_gib
        here = "" if free is None else f"; this machine has {free / GIB:.1f} GiB free"
        here = here if stated is None else f"; {cfg.hardware.name} hosts have {stated:.1f} GiB"
        yield f"memory of a host for its {local_ranks} ranks: {parts}{here}"


def _table(cfg: Config, grid: Grid) -> Iterator[str]:
    stages = range(grid.pp)
    needs = [memory(cfg, grid.world_size, stage) for stage in stages]
    unit, size = ("GiB", GIB) if max(need.total for need in needs) >= GIB else ("MiB", 2**20)
    names = [field.name for field in fields(Memory) if field.name not in ("host", "inputs", "snapshot")] + ["total"]
    rows = [["stage", "layers", "parameters", *names]]
    for stage, need in zip(stages, needs, strict=True):
        count = sum(rank_parameters(cfg, stage).values())
        rows.append([str(stage), _spans(cfg, stage), f"{count:,}", *(f"{getattr(need, n) / size:.2f}" for n in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield f"{unit} on the device of one rank, at the peak of a step:"
    for row in rows:
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
        yield "  ".join([*cells, *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))])


def _spans(cfg: Config, stage: int) -> str:
    """First and last layer of each chunk of the stage."""
    mine = [names for names, owner in zip(chunks(cfg), chunk_owners(cfg), strict=True) if owner == stage]
    return ", ".join(f"{names[0]}..{names[-1]}" for names in mine)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
