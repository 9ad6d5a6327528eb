"""Saving, loading and reshaping one state, next to DeepSpeed and torch.distributed.checkpoint, in one call.

python -m benchmarks.checkpoint.run OUT_FOLDER --commit HASH --disk FOLDER [--world 2] [--reshape parallel=tp2] [--n 3]
    [overrides of engine.train]

By default GPT 1.3B in ZeRO-1 with AdamW, 12 bytes of state a parameter. `stall` is what a step waits; `total` ends when
all is on disk (fsync, or sync for those that leave it to the system). The offline conversion is what DeepSpeed needs
before another layout can load; Octant reads the same files. Every checkpoint is removed after its turn.
Writes rows.jsonl.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.checkpoint import peers
from benchmarks.rows import append, row
from engine.checkpoint.restore import load as load_state
from engine.checkpoint.restore import open_verified
from engine.checkpoint.save import Saver
from engine.config.load import load
from engine.config.schema import Config
from engine.data import open_data
from engine.dist.context import ParallelContext
from engine.dist.init import resolve_device_type
from engine.dist.spawn import run_ranks
from engine.observe.log import quiet_libraries
from engine.protocols import Engine
from engine.topology.grid import Grid
from engine.train.loop import load as read_ahead
from engine.train.session import build_engine

WORDS = [
    "model=gpt_1_3b",
    "data=random",
    "data.seq_len=64",
    "zero=z1",
    "train.micro_batch=1",
    "train.accum_steps=1",
    "train.eval_batches=0",
    "kernels.compile=off",
    "checkpoint.every=0",
    "run.name=checkpoint",
]
FACTS: dict[str, Any] = {"step": 1, "samples": 1}
Times = dict[str, list[float]]
PROGRESS = "OCTANT_BENCHMARK_PROGRESS"
"""A file that tells how far it is: ranks have no terminal."""


def main(argv: list[str]) -> None:
    """Measure on ranks of one layout, then in another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--disk", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--reshape", default="", help="another layout of as many ranks; empty: not measured")
    parser.add_argument("--n", type=int, default=3)
    parser.add_argument("--systems", default="octant,deepspeed,torch dcp,torch dcp async")
    parser.add_argument("--medium", default="disk", help="what the folder is on, for the rows")
    parser.add_argument("--timeout", type=float, default=3000.0)
    options, overrides = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    options.disk.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(PROGRESS, str(options.out / "progress.txt"))
    words, systems = [*WORDS, *overrides], options.systems.split(",")
    cfg = load(words)
    ranks = partial(
        run_ranks,
        world_size=options.world,
        backend="nccl" if resolve_device_type(cfg.train.device) == "cuda" else "gloo",
        timeout_s=options.timeout,
    )
    found = ranks(measure, args=(words, options.disk, options.n, systems))[0]
    if options.reshape:
        found |= ranks(reshape, args=([*words, options.reshape], options.disk, options.n))[0]
        shutil.rmtree(options.disk / "ours")
        found["convert, deepspeed"] = [convert(options.disk, options.world)]
    for folder in ("ours", "deepspeed", "universal"):
        shutil.rmtree(options.disk / folder, ignore_errors=True)
    size = found.pop("bytes")[0]
    found["write, dd"] = [copy_rate(options.disk, int(size)) for _ in range(options.n)]
    entries = list(rows(found, cfg, int(size), options, words))
    append(options.out / "rows.jsonl", entries)
    for entry in entries:
        print(
            f"{entry['metric']:24} {entry['system']:28} {entry['p50']:9.3f} s {entry['gb_per_s']:8.2f} GB/s", flush=True
        )


def engine_of(words: Sequence[str]) -> tuple[Engine, Config]:
    """The engine after one step, so that the optimizer's state is there. Collective."""
    cfg = load(words)
    quiet_libraries(False)
    cuda = resolve_device_type(cfg.train.device) == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    ctx = ParallelContext.create(Grid.from_config(cfg.parallel, dist.get_world_size()), device)
    engine = build_engine(cfg, ctx)
    with read_ahead(open_data(cfg.data, cfg.model).train, [0], cfg, ctx) as batches:
        engine.train_step(next(batches), 1e-4)
    return engine, cfg


def measure(words: Sequence[str], disk: Path, n: int, systems: Sequence[str]) -> Times:
    """Seconds of saving and loading in one layout; leaves `ours` and `deepspeed` behind. Body of one rank."""
    engine, _ = engine_of(words)
    found: Times = {"bytes": [float(sum(slot.values.numel() * 4 for slot in engine.state().slots))]}
    everyone: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, found["bytes"][0])
    found["bytes"] = [sum(everyone)]
    if "octant" in systems:
        saver = Saver(engine, asynchronous=True)
        saver.prepare()
        for _ in range(n):
            _add(found, "octant", _ours(saver, disk / "ours"))
        _load(found, "octant", n, lambda: _load_ours(engine, disk / "ours"))
        saver.close()
    if "deepspeed" in systems:
        for _ in range(n):
            _add(found, "deepspeed", _fresh(disk / "deepspeed", partial(peers.deepspeed_save, engine)))
        _load(found, "deepspeed", n, lambda: peers.deepspeed_load(engine, disk / "deepspeed"))
    for name in ("torch dcp", "torch dcp async"):
        if name not in systems:
            continue
        save = partial(peers.dcp_save, engine, asynchronous=name.endswith("async"))
        for _ in range(n):
            _add(found, name, _fresh(disk / "dcp", save))
        _load(found, name, n, lambda: peers.dcp_load(engine, disk / "dcp"))
    _fresh(disk / "dcp", lambda folder: {})
    return found


def reshape(words: Sequence[str], disk: Path, n: int) -> Times:
    """Seconds of loading `ours` in another layout. Body of one rank."""
    engine, _ = engine_of(words)
    return {"reshape, octant": [_load_ours(engine, disk / "ours") for _ in range(n)]}


def convert(disk: Path, workers: int) -> float:
    """Seconds of DeepSpeed's offline conversion of what it saved."""
    return peers.universal_conversion(disk / "deepspeed", disk / "universal", workers)


def _ours(saver: Saver, folder: Path) -> dict[str, float]:
    def save(folder: Path) -> dict[str, float]:
        started = time.perf_counter()
        saver.save(folder, FACTS)
        saver.wait()
        dist.barrier()
        return {"stall": saver.stall_s, "total": time.perf_counter() - started}

    return _fresh(folder, save)


def _load_ours(engine: Engine, folder: Path) -> float:
    dist.barrier()
    started = time.perf_counter()
    load_state(engine, open_verified([folder], print))
    dist.barrier()
    return time.perf_counter() - started


def _fresh(folder: Path, save: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    """`save` into a folder that is not there, on a disk with nothing left to write."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    peers.sync()
    return save(folder)


def _add(found: Times, system: str, times: dict[str, float]) -> None:
    for metric, seconds in times.items():
        found.setdefault(f"{metric}, {system}", []).append(seconds)
    if dist.get_rank() == 0 and PROGRESS in os.environ:
        with Path(os.environ[PROGRESS]).open("a") as file:
            file.write(f"{system} {times}\n")


def _load(found: Times, system: str, n: int, load_once: Callable[[], float]) -> None:
    for _ in range(n):
        _add(found, system, {"load": load_once()})


def copy_rate(disk: Path, size: int) -> float:
    """Seconds in which `dd` writes as many zeros to the same disk."""
    target, blocks = disk / "zeros", max(1, size >> 24)
    started = time.perf_counter()
    words = ["dd", "if=/dev/zero", f"of={target}", "bs=16M", f"count={blocks}", "conv=fsync"]
    subprocess.run(words, capture_output=True, check=True)
    took = time.perf_counter() - started
    target.unlink()
    return took


def rows(
    found: Times, cfg: Config, size: int, options: argparse.Namespace, words: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each metric of each system."""
    cuda = resolve_device_type(cfg.train.device) == "cuda"
    hardware = torch.cuda.get_device_name(0) if cuda else "CPU"
    case = f"{cfg.model.name} {cfg.precision.dtype} zero {cfg.zero.stage}, {options.world} ranks, {size / 1e9:.1f} GB"
    case += f", {options.medium}"
    made = []
    for key, seconds in found.items():
        metric, system = key.split(", ")
        values = seconds if len(seconds) > 1 else seconds * 2
        entry = row(
            case=case if metric != "reshape" else f"{case} -> {options.reshape}",
            system=system,
            metric=metric,
            unit="s",
            values=values,
            hardware=hardware,
            commit=options.commit,
            command=f"python -m benchmarks.checkpoint.run {' '.join(words)}",
        )
        made.append(entry | {"n": len(seconds), "bytes": size, "gb_per_s": size / 1e9 / entry["p50"]})
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
