"""Assemble a run: data, ranks, model, engine, hooks; then train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine import runtime
from engine.checkpoint.initial import initial_weights
from engine.config.derived import head_dim
from engine.config.launch_env import LaunchEnv
from engine.config.load import config_hash, resolved_yaml, to_dict
from engine.config.schema import Config
from engine.data import Data, open_data
from engine.data import prepare as prepare_data
from engine.dist import init
from engine.dist.context import ParallelContext
from engine.errors import CheckpointError, ConfigError
from engine.model.build import build_layers
from engine.model.layers import logical_tensors, random_weights
from engine.observe import log
from engine.observe.environment import environment
from engine.observe.folder import open_run_folder, usable_run_folder
from engine.plan.stages import stage_bounds
from engine.protocols import Engine
from engine.runtime import extensions
from engine.topology.grid import Grid
from engine.train.describe import describe
from engine.train.hooks import standard_hooks
from engine.train.loop import fit
from engine_kernels import ops  # noqa: F401  (registers the implementations)
from engine_kernels.registry import Choice, KernelUnavailable, Situation, choose


def check_before_launch(cfg: Config) -> None:
    """Refuse what needs no other rank to be seen, while one process is there to say it once.

    Raises:
        EngineError: see `prepare` and `usable_run_folder`.
    """
    prepare(cfg, torch.device(init.resolve_device_type(cfg.train.device)))
    usable_run_folder(cfg.run.dir, cfg.run.name, cfg.run.overwrite)


def prepare(cfg: Config, device: torch.device, *, verify: bool = True) -> Data:
    """Look at kernels and initial weights, and build tokenizer and token files if they are not there yet.

    Needs no other rank: builders lock each other out. With `verify`, what was built before is read whole.

    Raises:
        ConfigError: see `choose_attention` and `extensions.require`.
        CheckpointError: see `initial_weights`.
        DataError: the corpus is missing, damaged or too small.
    """
    extensions.require(cfg)
    attention = choose_attention(cfg, device)
    if cfg.checkpoint.initial_weights is not None:
        layers = build_layers(cfg, ParallelContext.single(), attention.impl.fn)
        initial_weights(cfg.checkpoint.initial_weights, cfg.model, logical_tensors(layers))
    prepare_data(cfg.data, log.say, verify=verify)
    return open_data(cfg.data, cfg.model)


def choose_attention(cfg: Config, device: torch.device) -> Choice:
    """The attention implementation for this run, the same for every layer.

    Raises:
        ConfigError: the one asked for cannot run here.
    """
    situation = Situation(
        device,
        init.DTYPES[cfg.precision.dtype],
        head_dim=head_dim(cfg.model),
        dropout=cfg.model.attention_dropout > 0,
        documents=cfg.data.document_mask,
    )
    try:
        return choose("attention", str(cfg.kernels.attention), situation)
    except KernelUnavailable as error:
        raise ConfigError.of(
            330, "kernels.attention", cfg.kernels.attention, str(error), "Use kernels.attention=auto"
        ) from error


def build_engine(cfg: Config, ctx: ParallelContext) -> Engine:
    """The engine of this rank, with what it is made of printed by rank 0. Collective."""
    attention = choose_attention(cfg, ctx.device)
    layers = build_layers(cfg, ctx, attention.impl.fn)
    bounds = stage_bounds(cfg)
    for line in describe(cfg, ctx, [layer.name for layer in layers], bounds, attention):
        log.say(line)
    initial = random_weights(cfg.train.seed)
    if cfg.checkpoint.initial_weights is not None:
        initial = initial_weights(cfg.checkpoint.initial_weights, cfg.model, logical_tensors(layers))
    return runtime.build(layers, bounds, initial, cfg, ctx)


def open_folder(cfg: Config) -> Path:
    """Rank 0 makes the run folder; every rank learns of a refusal.

    Raises:
        CheckpointError: see `open_run_folder`.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            folder = open_run_folder(cfg.run.dir, cfg.run.name, cfg.run.overwrite)
            (folder / "config.yaml").write_text(resolved_yaml(cfg))
            (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
        except CheckpointError as error:
            outcome[0] = error.violations
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(outcome[0])
    folder = Path(cfg.run.dir) / cfg.run.name
    if cfg.checkpoint.save_final:
        _require_shared(folder)
    return folder


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
            f"ranks {blind} do not see {folder}, which rank 0 made, and every stage writes its weights there",
            "Point run.dir to a folder that all hosts share, or use checkpoint.save_final=false",
        )


def run(cfg: Config, env: LaunchEnv) -> dict[str, Any]:
    """Train as this rank of the job; returns the summary that rank 0 writes to `summary.json`."""
    log.configure(env.rank)
    log.quiet_libraries(cfg.logging.verbose)
    device = init.local_device(init.resolve_device_type(cfg.train.device), env.local_rank)
    init.export(env)
    init.set_numerics(device, cfg.train.cpu_threads, env.local_world_size, tf32=cfg.precision.tf32)
    grid = Grid.from_config(cfg.parallel, env.world_size)
    data = prepare(cfg, device, verify=env.local_rank == 0)
    init.init_process_group(env, device, cfg.train.timeout_s)
    init.require_equal_config(config_hash(cfg), data.fingerprint)
    folder = open_folder(cfg)
    ctx = ParallelContext.create(grid, device)
    engine = build_engine(cfg, ctx)
    for note in data.notes:
        log.say(note)
    hooks = standard_hooks(engine, data, cfg, folder, to_dict(cfg))
    summary = fit(engine, data, cfg, hooks)
    init.shutdown()
    return summary
