"""`python -m engine.study timeline`: when the stages of a pipeline do what, predicted and measured.

The prediction runs the schedule's program with the measured median of each chunk's passes and with free messages, so
what the measurement has beyond it is what messages, and passes that vary, cost.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

from engine.config import rules
from engine.config.load import load
from engine.config.schema import Config
from engine.data import prepare
from engine.dist.init import resolve_device_type
from engine.dist.spawn import run_ranks
from engine.errors import LaunchError
from engine.observe.folder import open_run_folder
from engine.observe.log import quiet_libraries, say
from engine.observe.timeline import draw_timeline
from engine.optim.schedule import learning_rate
from engine.study.run import PRELOAD
from engine.topology.execution import execute
from engine.topology.grid import Grid
from engine.topology.program import COMPUTE, OpKind, Program
from engine.topology.schedule import build
from engine.topology.timeline import Event, Timeline
from engine.train.loop import global_batch
from engine.train.loop import load as read_ahead

DEFAULTS = [
    "parallel=pp2",
    "data=random",
    "data.seq_len=64",
    "train.steps=8",
    "train.accum_steps=8",
    "run.name=timeline",
]
"""Overrides that come before the user's."""
WARMUP_STEPS = 2
TIMEOUT_S = 600.0


def main(argv: Sequence[str]) -> int:
    """Run `train.steps` steps, write timeline.png and timeline.json into the run folder; always 0.

    Raises:
        LaunchError: 522 no pipeline, or no step after the warm-up; else as `rules.require` and `open_run_folder` do.
    """
    _, overrides = _parser().parse_known_args(argv)
    cfg = load([*DEFAULTS, *overrides])
    from engine.train.local import world_size

    world = world_size(cfg)
    rules.require(cfg, world)
    _require_pipeline(cfg)
    quiet_libraries(cfg.logging.verbose)
    prepare(cfg.data, say)
    folder = open_run_folder(cfg.run)
    steps = trace(cfg, world)
    timelines = {"predicted": predict(program_of(cfg), steps), "measured": typical(steps)}
    (folder / "timeline.json").write_text(
        json.dumps({name: timeline.to_rows() for name, timeline in timelines.items()}, indent=1) + "\n"
    )
    parallel = cfg.parallel
    title = f"{cfg.model.name}: {parallel.schedule}, {parallel.pp} stages, {cfg.train.accum_steps} micro-batches"
    draw_timeline(folder / "timeline.png", list(timelines.items()), title)
    say(title)
    for name, timeline in timelines.items():
        say(f"{name}: {timeline.makespan:.4g} s, bubble {timeline.bubble:.1%}")
    say(f"median of {len(steps)} steps; picture and rows in {folder}")
    return 0


def program_of(cfg: Config) -> Program:
    """The training program of `cfg`."""
    parallel = cfg.parallel
    return build(parallel.schedule, parallel.pp, cfg.train.accum_steps, parallel.virtual_stages)


def trace(cfg: Config, world: int) -> list[Timeline]:
    """The steps after the warm-up as the first replica's stages ran them, on local processes."""
    backend = "nccl" if resolve_device_type(cfg.train.device) == "cuda" else "gloo"
    ranks = run_ranks(trace_rank, world, (cfg,), backend=backend, timeout_s=TIMEOUT_S, preload=PRELOAD)
    stages = Grid.from_config(cfg.parallel, world).groups("pp")[0]
    return [
        Timeline.from_events(event for rank in stages for event in ranks[rank][step])
        for step in range(WARMUP_STEPS, cfg.train.steps)
    ]


def trace_rank(cfg: Config) -> list[list[Event]]:
    """Body of one rank: what its stage did in each step. All ranks of a machine read the same clock."""
    from engine.runtime.pipeline import PipelineRunner
    from engine.train.session import open_rank

    engine, train = open_rank(cfg)
    assert isinstance(engine, PipelineRunner)
    steps: list[list[Event]] = []
    firsts = range(0, cfg.train.steps * global_batch(cfg, engine.ctx), global_batch(cfg, engine.ctx))
    with read_ahead(train, firsts, cfg, engine.ctx) as batches:
        for step in range(cfg.train.steps):
            engine.training.trace = []
            engine.train_step(next(batches), learning_rate(cfg.optim, step, cfg.train.steps))
            steps.append(engine.training.trace)
    return steps


def predict(program: Program, steps: Iterable[Timeline]) -> Timeline:
    """`program` with the median duration of each chunk's forward and backward passes in `steps`."""
    seconds: defaultdict[tuple[OpKind, int], list[float]] = defaultdict(list)
    for step in steps:
        for events in step.events:
            for event in events:
                seconds[event.op.kind, event.op.chunk].append(event.end - event.start)
    forward_s, backward_s = ([median(seconds[kind, chunk]) for chunk in range(program.chunks)] for kind in COMPUTE)
    return execute(program, forward_s, backward_s)


def typical(steps: Sequence[Timeline]) -> Timeline:
    """The step of median length, the longer one of two."""
    return sorted(steps, key=lambda step: step.makespan)[len(steps) // 2]


def _require_pipeline(cfg: Config) -> None:
    if cfg.parallel.pp == 1:
        raise LaunchError.of(522, "parallel.pp", 1, "one stage has no pipeline to look at", "Use parallel.pp=2")
    if cfg.train.steps <= WARMUP_STEPS:
        rule = f"the first {WARMUP_STEPS} steps are warm-up and not measured"
        raise LaunchError.of(522, "train.steps", cfg.train.steps, rule, f"Use train.steps={WARMUP_STEPS + 1}")


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="python -m engine.study timeline",
        description="Run a pipeline for a few steps and draw when its stages computed, beside what its schedule "
        "predicts. Arguments are overrides of the configuration, such as parallel=dualpipev.",
    )
