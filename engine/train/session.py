"""Assemble a run: data, ranks, model, engine, hooks; then train."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine import runtime
from engine.checkpoint.initial import final_step, initial_weights
from engine.checkpoint.mirror import Mirror
from engine.checkpoint.reader import Reader
from engine.checkpoint.restore import load as load_state
from engine.checkpoint.restore import open_first, open_verified, require_same_optimizer
from engine.checkpoint.retention import CHECKPOINTS, complete_steps, step_folder
from engine.config.derived import streams, writes_checkpoints
from engine.config.hardware import resolve
from engine.config.launch_env import LaunchEnv
from engine.config.load import config_hash, resolved_yaml
from engine.config.schema import Config
from engine.data import Data, Split, open_data
from engine.data import prepare as prepare_data
from engine.dist import init
from engine.dist.context import ParallelContext
from engine.errors import CheckpointError
from engine.model.build import build_layers
from engine.model.layers import logical_tensors, random_weights
from engine.observe import log
from engine.observe.environment import environment
from engine.observe.folder import METRICS_FILE, MICRO_BATCH_FILE, hold_run_folder, open_run_folder, usable_run_folder
from engine.optim.state import kinds_of
from engine.parallel.logical import LogicalTensor
from engine.plan import host
from engine.plan.fit import budget_bytes, settle_offload
from engine.plan.stages import stage_bounds
from engine.protocols import Engine
from engine.runtime import extensions
from engine.topology.grid import Grid
from engine.train import ancestors
from engine.train.checkpoints import beginnings, changed_options, fetch_missing, require_fitting, rewind, shapes_of
from engine.train.describe import describe
from engine.train.hooks import standard_hooks
from engine.train.kernels import choose_kernels
from engine.train.loop import Cursor, Hook, StopRequested, fit
from engine.train.stop import StopSignal

T = TypeVar("T")
FOUND = "OCTANT_MICRO_BATCH"
"""Variable with the record of how `train.micro_batch=auto` was found, for the run folder."""
READY_FILE = "OCTANT_READY_FILE"
"""Variable that names a file to create when the ranks have met and the model is built, for probes of Kubernetes."""


def check_before_launch(cfg: Config) -> None:
    """Refuse what needs no other rank to be seen, while one process is there to say it once.

    Raises:
        EngineError: see `prepare` and `usable_run_folder`.
    """
    prepare(cfg, torch.device(init.resolve_device_type(cfg.train.device)))
    usable_run_folder(cfg.run)


def is_finished(cfg: Config) -> bool:
    """Whether the run that is to be resumed has nothing left to do; says so."""
    run, steps = Path(cfg.run.dir) / cfg.run.name, cfg.train.steps
    if not cfg.run.resume:
        return False
    saved = complete_steps(run / CHECKPOINTS)
    # Weights without the last checkpoint: there was no room for it, and the last steps are done again. Without any
    # checkpoint there is nothing to go on from.
    ended = step_folder(run, steps) == saved[0] if saved else cfg.checkpoint.save_final
    done = ended and (not cfg.checkpoint.save_final or final_step(run) == steps)
    if done:
        log.say(f"{run} has all its {steps} steps already: nothing to do")
    return done


def prepare(cfg: Config, device: torch.device, *, verify: bool = True) -> Data:
    """Look at kernels, initial weights and the state to go on from; build tokenizer and token files if need be.

    Needs no other rank: builders lock each other out. With `verify`, what was built before is read whole.

    Raises:
        ConfigError: see `choose_kernels` and `extensions.require`.
        CheckpointError: see `initial_weights`, `beginnings`, `require_fitting` and `require_same_optimizer`.
        DataError: the corpus is missing, damaged or too small.
    """
    extensions.require(cfg)
    layers = build_layers(cfg, ParallelContext.single(), choose_kernels(cfg, device).kernels)
    tensors = logical_tensors(layers)
    if cfg.checkpoint.mirror is not None:
        Mirror(cfg.checkpoint.mirror)
    paths, option = beginnings(cfg)
    if cfg.checkpoint.initial_weights is not None and not paths:
        initial_weights(cfg.checkpoint.initial_weights, cfg.model, tensors, verify=verify)
    prepare_data(cfg.data, log.say, verify=verify)
    data = open_data(cfg.data, cfg.model)
    if paths:
        reader = open_first(paths, log.say, option)
        require_fitting(reader, cfg, data.fingerprint, shapes_of(tensors), option)
        require_same_optimizer(reader, kinds_of(cfg.optim), option)
    return data


def build_engine(cfg: Config, ctx: ParallelContext, *, empty: bool = False) -> Engine:
    """The engine of this rank, with what it is made of printed by rank 0. Collective.

    Args:
        empty: weights are zero, to be loaded.
    """
    _settle(cfg, ctx.pp.size * ctx.tp.size * ctx.reduce.size, ctx.device)
    chosen = choose_kernels(cfg, ctx.device)
    layers = build_layers(cfg, ctx, chosen.kernels)
    bounds = stage_bounds(cfg)
    for line in describe(cfg, ctx, [layer.name for layer in layers], bounds, chosen):
        log.say(line)
    initial = _zeros if empty else random_weights(cfg.train.seed)
    if cfg.checkpoint.initial_weights is not None and not empty:
        initial = initial_weights(cfg.checkpoint.initial_weights, cfg.model, logical_tensors(layers))
    return runtime.build(layers, bounds, initial, cfg, ctx, chosen.kernels.adamw_step)


def _settle(cfg: Config, world_size: int, device: torch.device) -> None:
    """Set the offloaded share of the state where it depends on the device."""
    if line := settle_offload(cfg, world_size, _budget(cfg, device)):
        log.say(line)


def _budget(cfg: Config, device: torch.device) -> int | None:
    """Bytes that this rank may take of a GPU."""
    if device.type != "cuda":
        return None
    hardware = resolve(cfg.hardware, torch.cuda.get_device_name(device))
    return budget_bytes(hardware, torch.cuda.get_device_properties(device).total_memory)


def _zeros(logical: LogicalTensor) -> torch.Tensor:
    return torch.zeros(()).expand(logical.shape)


def open_folder(cfg: Config, start: Cursor, device: torch.device) -> Path:
    """Rank 0 makes the run folder, or takes up the one of a run that goes on; every rank learns of a refusal.

    Raises:
        CheckpointError: see `open_run_folder`.
    """

    def make() -> None:
        folder = open_run_folder(cfg.run)
        rewind(folder / METRICS_FILE, start.step)
        (folder / "config.yaml").write_text(resolved_yaml(cfg))
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
        (folder / "kernels.json").write_text(json.dumps(choose_kernels(cfg, device).record(), indent=1) + "\n")
        if FOUND in os.environ:
            (folder / MICRO_BATCH_FILE).write_text(os.environ[FOUND])

    _on_main(make)
    folder = Path(cfg.run.dir) / cfg.run.name
    if cfg.checkpoint.save_final or cfg.checkpoint.every:
        _require_shared(folder)
    return folder


def _on_main(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank. Collective. Raises CheckpointError everywhere when it does."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except CheckpointError as error:
            outcome[1] = error.violations
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    found: T = outcome[0]
    return found


def _require_shared(folder: Path) -> None:
    """Refuse at the start what would otherwise lose the weights at the end (603)."""
    seen = [True] * dist.get_world_size()
    dist.all_gather_object(seen, (folder / "config.yaml").is_file())
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise CheckpointError.of(
            603,
            "run.dir",
            folder.parent,
            f"ranks {blind} do not see {folder}, which rank 0 made, and every rank writes its part of the state there",
            "Point run.dir to a folder that all hosts share, or use checkpoint.save_final=false checkpoint.every=0",
        )


def go_on(cfg: Config, data: Data, device: torch.device) -> tuple[Reader | None, Cursor, str]:
    """The checkpoint to go on from, all of it checked, and where it stands; None: a new run. Collective.

    Raises:
        CheckpointError: no checkpoint is whole, or it does not fit; see `open_verified`, `require_fitting` and
            `require_same_optimizer`.
    """

    def look() -> tuple[list[Path], str]:
        # Before it is read: the run that wrote it may not have ended yet.
        hold_run_folder(cfg.run)
        fetch_missing(cfg)
        return beginnings(cfg)

    paths, option = _on_main(look)
    if not paths:
        return None, Cursor(), option
    reader = open_verified(paths, log.say, option)
    layers = build_layers(cfg, ParallelContext.single(), choose_kernels(cfg, device).kernels)
    require_fitting(reader, cfg, data.fingerprint, shapes_of(logical_tensors(layers)), option)
    require_same_optimizer(reader, kinds_of(cfg.optim), option)
    facts = reader.manifest.facts
    return reader, Cursor(int(facts["step"]), int(facts["samples"])), option


def open_rank(cfg: Config, *, empty: bool = False) -> tuple[Engine, Split]:
    """Engine and training data of a rank that `run_ranks` has started, for studies that step by themselves.

    Args:
        empty: weights are zero.
    """
    log.quiet_libraries(cfg.logging.verbose)
    world = dist.get_world_size()
    cuda = init.resolve_device_type(cfg.train.device) == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    init.set_numerics(device, cfg.train.cpu_threads or 1, world, tf32=cfg.precision.tf32)
    ctx = ParallelContext.create(Grid.from_config(cfg.parallel, world), device)
    return build_engine(cfg, ctx, empty=empty), open_data(cfg.data, cfg.model).train


def run(
    cfg: Config,
    env: LaunchEnv,
    *,
    join: Callable[[LaunchEnv, torch.device, float], None] = init.init_process_group,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Train as this rank of the job; returns the summary that rank 0 writes to `summary.json`.

    Args:
        join: makes the process group.
        hooks: called before those of a run.

    Raises:
        ConfigError: the host has no memory for the share of the state that its devices leave it (345).
        StopRequested: SIGTERM or SIGUSR1 came; the state is saved.
    """
    ancestors.watch(env.launcher)
    log.configure(env.rank)
    log.quiet_libraries(cfg.logging.verbose)
    init.order_launches(cfg.parallel, cfg.zero.stage)
    device = init.local_device(init.resolve_device_type(cfg.train.device), env.local_rank)
    init.export(env)
    init.set_numerics(device, cfg.train.cpu_threads, env.local_world_size, tf32=cfg.precision.tf32)
    grid = Grid.from_config(cfg.parallel, env.world_size)
    data = prepare(cfg, device, verify=env.local_rank == 0)
    join(env, device, cfg.train.timeout_s)
    init.require_equal_config(config_hash(cfg), data.fingerprint)
    if streams(cfg) and cfg.zero.offload_ratio is None:
        # After hosts with different devices were found to have equal options, and before any rank takes memory.
        _settle(cfg, env.world_size, device)
        host.require(cfg, env.world_size, env.local_world_size)
    reader, start, option = go_on(cfg, data, device)
    folder = open_folder(cfg, start, device)
    ctx = ParallelContext.create(grid, device)
    engine = build_engine(cfg, ctx, empty=reader is not None)
    if reader is not None:
        count = load_state(engine, reader, option)
        log.say(f"going on from {reader.folder}: step {start.step}, sample {start.samples}, {count} tensors")
        for line in changed_options(reader, cfg):
            log.say(line)
    for note in data.notes:
        log.say(note)
    if env.local_rank == 0 and READY_FILE in os.environ:
        Path(os.environ[READY_FILE]).touch()
    stop = StopSignal()
    if writes_checkpoints(cfg):
        stop.install()
    try:
        every = [*hooks, *standard_hooks(engine, data, cfg, folder, start, stop)]
        summary = fit(engine, data, cfg, every, start)
    except StopRequested:
        # A launcher kills the others when the first rank leaves, and rank 0 may not be done.
        dist.barrier()
        init.shutdown()
        raise
    finally:
        stop.restore()
    init.shutdown()
    return summary
