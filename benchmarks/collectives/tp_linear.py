"""Transformer blocks with tensor and sequence parallelism: what collectives cost under each `parallel.tp_overlap`.

python -m benchmarks.collectives.tp_linear OUT_FOLDER --commit HASH [--tp 2] [--micro 1,2] [overrides of engine.train]

Blocks of the model (default: llama_8b, sequence 4096, bf16, compiled) run forward and backward in a chain, all systems
in alternation in one call. `alone` holds the same slices and sends nothing: what is above it is exposed. All launch
kernels through one queue, as training with `chunked` does, unless CUDA_DEVICE_MAX_CONNECTIONS says otherwise. Writes
rows.jsonl: milliseconds of a block, forward and backward. On CPUs only --quick, which shows that it runs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.rows import append, row
from engine.config.enums import TpOverlap
from engine.config.load import load
from engine.config.schema import Config
from engine.dist import init
from engine.dist.context import AxisGroup, ParallelContext
from engine.dist.spawn import run_ranks
from engine.model.build import build_layers
from engine.topology.grid import Grid
from engine.train.kernels import choose_kernels

CHAIN = 4
"""Blocks one after the other, so that the host is ahead of the GPU as in training."""
WARMUP, ROUNDS = 4, 20
SYSTEMS = ("alone", "none", "chunked", "symmetric")

Times = dict[str, dict[int, list[float]]]
"""System -> sequences in a micro-batch -> seconds of a block."""


def main(argv: list[str] | None = None) -> None:
    """Measure, print a line for each system and micro-batch, and write the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--micro", default="1,2")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--quick", action="store_true")
    options, words = parser.parse_known_args(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        parser.error("no CUDA device is visible; on a CPU only --quick runs")
    options.out.mkdir(parents=True, exist_ok=True)
    small = ["model=llama_tiny", "data.seq_len=32", "precision=fp32", "kernels.compile=off", "train.device=cpu"]
    base = small if options.quick else ["model=llama_8b", "data.seq_len=4096", "precision=bf16"]
    words = [*base, f"parallel.tp={options.tp}", "parallel.sequence=true", *words]
    micros = [int(n) for n in options.micro.split(",")]
    systems = [s for s in options.systems.split(",") if cuda or s != "symmetric"]
    arguments = (words, systems, micros, 2 if options.quick else ROUNDS)
    # Here, as ranks begin with CUDA before they are asked for anything.
    cfg = load(words)
    init.order_launches(cfg.parallel, cfg.zero.stage)
    backend = "nccl" if cuda and not options.quick else "gloo"
    times: Times = run_ranks(measure, options.tp, arguments, backend=backend, timeout_s=560)[0]
    hardware = torch.cuda.get_device_name(0) if backend == "nccl" else "CPU"
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "default")
    for micro in micros:
        for system in systems:
            entry = row(
                case=f"block tp{options.tp}+sequence micro {micro}",
                system=system,
                metric="block_ms",
                unit="ms",
                values=[1e3 * s for s in times[system][micro]],
                hardware=hardware,
                commit=options.commit,
                overrides=words,
                device_max_connections=connections,
            )
            append(options.out / "rows.jsonl", [entry])
            print(f"{entry['case']} {system}: {entry['p50']:.3f} ms ({entry['p20']:.3f} to {entry['p80']:.3f})")


def measure(words: list[str], systems: list[str], micros: list[int], rounds: int) -> Times:
    """Body of one rank."""
    cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    cfg = load(words)
    ctx = ParallelContext.create(Grid(tp=dist.get_world_size()), device)
    times: Times = {system: {} for system in systems}
    for micro in micros:
        steps = {system: _chain(cfg, ctx, system, micro) for system in systems}
        found: dict[str, list[float]] = {system: [] for system in systems}
        for turn in range(WARMUP + rounds):
            for system in systems if turn % 2 else reversed(systems):
                seconds = _seconds(steps[system], device) / CHAIN
                if turn >= WARMUP:
                    found[system].append(seconds)
        for system in systems:
            times[system][micro] = found[system]
    return times


def _chain(cfg: Config, ctx: ParallelContext, system: str, micro: int) -> Callable[[], None]:
    """Forward and backward passes of blocks with weights of their own."""
    length, tp = cfg.data.seq_len, ctx.tp
    if system == "alone":
        tp = AxisGroup(rank=tp.rank, size=tp.size, ranks=tp.ranks, group=None)
    else:
        cfg.parallel.tp_overlap = TpOverlap[system]
        length //= tp.size
    kernels = choose_kernels(cfg, ctx.device).kernels
    blocks = [d for d in build_layers(cfg, replace(ctx, tp=tp), kernels) if d.repeats][:CHAIN]
    dtype = init.DTYPES[cfg.precision.dtype]
    modules: list[nn.Module] = []
    for block in blocks:
        module = block.factory().to(ctx.device, dtype)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        if cfg.kernels.compile.value != "off" and ctx.device.type == "cuda":
            module.compile()
        modules.append(module)
    x = torch.randn(micro, length, cfg.model.hidden_size, device=ctx.device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> None:
        y: Tensor = x
        for module in modules:
            y = module(y)
        y.backward(grad)
        for tensor in (x, *(p for module in modules for p in module.parameters())):
            tensor.grad = None

    return step


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    dist.barrier()
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3


if __name__ == "__main__":
    main()
