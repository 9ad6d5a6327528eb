"""Steps of a pipeline under each `parallel.pipeline_transport`, and how far they are from their schedule's ideal.

python -m benchmarks.collectives.pipeline OUT_FOLDER --commit HASH [overrides of engine.train]

By default gpt_2_7b on two GPUs, sequence 2048, 16 micro-batches of 4, 1F1B, stages of equal FLOPs, bf16, ZeRO-1. One
engine runs all systems in alternation. `alone` has every pass and the optimizer, but no stage hears of another: its
step is the slower stage's work. The idle share of a step is what it has beyond that; the schedule's formula is the
least. Writes rows.jsonl. On CPUs only --quick, which shows that it runs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.rows import append, row
from engine.config.enums import Transport
from engine.config.load import config_hash, load
from engine.dist.spawn import run_ranks
from engine.runtime.channels import Incoming
from engine.study.run import PRELOAD
from engine.study.timeline import program_of
from engine.topology.program import Op, OpKind
from engine.topology.schedule import bubble_formula

WARMUP, ROUNDS = 2, 10
WORDS = [
    "model=gpt_2_7b",
    "data=random",
    "data.seq_len=2048",
    "parallel=pp2",
    "zero=z1",
    "precision=bf16",
    "train.micro_batch=4",
    "train.accum_steps=16",
    "train.steps=64",
]
QUICK = ["model=gpt_tiny", "data.seq_len=32", "precision=fp32", "train.micro_batch=1", "train.device=cpu"]


class Alone:
    """Channels of a stage that has no others: what it receives is always there."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[bool, tuple[int, ...]], Tensor] = {}

    def send(self, op: Op, tensor: Tensor) -> None:
        """Nobody gets it."""

    def receive(self, op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> Incoming:
        """Random numbers of this shape, as large as activations or small as gradients are."""
        gradient = op.kind is OpKind.recv_grad
        if (gradient, shape) not in self._tensors:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            scale = 1e-6 if gradient else 1.0
            self._tensors[gradient, shape] = torch.randn(shape, dtype=dtype, device=device) * scale
        return Incoming(self._tensors[gradient, shape].detach(), Arrived())

    def finish(self) -> None:
        """Nothing is under way."""


class Arrived(dist.Work):
    """Of a message that is there."""

    def wait(self, *args: Any) -> bool:
        """At once."""
        return True


def main(argv: list[str] | None = None) -> None:
    """Measure, print each system's step and idle share next to the formula's, and write the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--quick", action="store_true")
    options, overrides = parser.parse_known_args(argv)
    if not torch.cuda.is_available() and not options.quick:
        parser.error("no CUDA device is visible; on a CPU only --quick runs")
    words = [*WORDS, *(QUICK if options.quick else []), *overrides]
    cfg = load(words)
    parallel, world = cfg.parallel, cfg.parallel.pp
    backend = "gloo" if options.quick else "nccl"
    rounds = 2 if options.quick else ROUNDS
    times = run_ranks(measure, world, (words, rounds), backend=backend, timeout_s=580, preload=PRELOAD)[0]
    counts = (parallel.pp, cfg.train.accum_steps, parallel.virtual_stages)
    least = bubble_formula(parallel.schedule, *counts)
    alone = median(times["alone"])
    tokens = cfg.train.accum_steps * cfg.train.micro_batch * cfg.data.seq_len / world
    options.out.mkdir(parents=True, exist_ok=True)
    for system, values in times.items():
        idle = 1 - alone / median(values)
        entry = row(
            case=f"{cfg.model.name} pp{parallel.pp} {parallel.schedule} v{parallel.virtual_stages}",
            system=system,
            metric="step_s",
            unit="s",
            values=values,
            hardware="CPU" if options.quick else torch.cuda.get_device_name(0),
            commit=options.commit,
            overrides=words,
            config=config_hash(cfg),
            idle_share=idle,
            least_idle_share=least,
            tokens_per_s_per_gpu=tokens / median(values),
        )
        append(options.out / "rows.jsonl", [entry])
        print(
            f"{entry['case']} {system}: {entry['p50']:.4f} s, {tokens / median(values):.0f} tokens/s per GPU, "
            f"idle {idle:.1%} (formula {least:.1%})"
        )


def measure(words: list[str], rounds: int) -> dict[str, list[float]]:
    """Body of one rank: system -> seconds of its steps."""
    from engine.runtime.pipeline import PipelineRunner
    from engine.runtime.transport import open_messages
    from engine.train.loop import global_batch
    from engine.train.loop import load as read_ahead
    from engine.train.session import open_rank

    cfg = load(words)
    engine, train = open_rank(cfg)
    assert isinstance(engine, PipelineRunner)
    systems: dict[str, Any] = {"alone": Alone(), "nccl": engine.training.channels}
    if dist.get_backend() == "nccl":
        cfg.parallel.pipeline_transport = Transport.copy_engine
        systems["copy_engine"] = open_messages(cfg, engine.ctx, program_of(cfg))
    size = global_batch(cfg, engine.ctx)
    found: dict[str, list[float]] = {system: [] for system in systems}
    steps = (WARMUP + rounds) * len(systems)
    with read_ahead(train, range(0, steps * size, size), cfg, engine.ctx) as batches:
        for turn in range(WARMUP + rounds):
            for system in systems if turn % 2 else reversed(systems):
                engine.training.channels = systems[system]
                step = next(batches)
                dist.barrier()
                _wait(engine.ctx.device)
                start = time.perf_counter()
                # A rate of 0: what `alone` learns from must not be learned.
                engine.train_step(step, 0.0)
                _wait(engine.ctx.device)
                if turn >= WARMUP:
                    found[system].append(time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
