"""One process of the memory benchmark: build a model, run some steps, write times and peaks as JSON.

python -m benchmarks.memory.measure OUT.json [overrides of engine.train]

Weights are drawn on the device, each layer as it is built: on a CPU the normal draw of 6.7 billion weights takes
minutes, and their values do not matter here.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine import runtime
from engine.config.load import load
from engine.config.rules import require
from engine.config.schema import Config
from engine.data import open_data, prepare
from engine.dist.context import ParallelContext
from engine.dist.init import local_device, resolve_device_type, set_numerics
from engine.model.build import build_layers
from engine.model.layers import InitialWeights
from engine.observe.log import quiet_libraries, say
from engine.optim.schedule import learning_rate
from engine.parallel.logical import LogicalTensor
from engine.parallel.symmetric import peak_bytes
from engine.plan.stages import stage_bounds
from engine.runtime import extensions
from engine.topology.grid import Grid
from engine.train.kernels import choose_kernels


def drawn_on(device: torch.device) -> InitialWeights:
    """Initial weights of the usual distribution; other values on other devices."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(logical: LogicalTensor) -> Tensor:
        if logical.init_std is None:
            return torch.full(logical.shape, logical.init_value, device=device)
        return torch.empty(logical.shape, device=device).normal_(0.0, logical.init_std, generator=generator)

    return draw


def main(argv: list[str]) -> None:
    """Measure; an allocation that fails on the device is a result too."""
    out, cfg = Path(argv[0]), load(argv[1:])
    require(cfg, 1)
    extensions.require(cfg)
    quiet_libraries(cfg.logging.verbose)
    device = local_device(resolve_device_type(cfg.train.device), 0)
    set_numerics(device, cfg.train.cpu_threads, 1, tf32=cfg.precision.tf32)
    prepare(cfg.data, say)
    # DeepSpeed asks the environment who it is.
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            result = _steps(cfg, device)
        except torch.OutOfMemoryError as error:
            result = {"out_of_memory": str(error).splitlines()[0], "peak_bytes": peak_bytes(device)}
        dist.destroy_process_group()
    # Linux counts the peak of the resident set in KiB.
    result["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out.write_text(json.dumps(result))


def _steps(cfg: Config, device: torch.device) -> dict[str, object]:
    start = time.perf_counter()
    ctx = ParallelContext.create(Grid.from_config(cfg.parallel, 1), device)
    kernels = choose_kernels(cfg, device).kernels
    layers = build_layers(cfg, ctx, kernels)
    engine = runtime.build(layers, stage_bounds(cfg), drawn_on(device), cfg, ctx, kernels.adamw_step)
    build_s, built_bytes = time.perf_counter() - start, peak_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    split, train = open_data(cfg.data, cfg.model).train, cfg.train
    seconds, losses = [], []
    for step in range(train.steps):
        start = time.perf_counter()
        batches = split.micro_batches(
            step * train.micro_batch * train.accum_steps,
            dp_rank=0,
            dp=1,
            micro_batch=train.micro_batch,
            accum_steps=train.accum_steps,
        )
        # Reading the loss waits for the step.
        losses.append(float(engine.train_step(batches, learning_rate(cfg.optim, step, train.steps)).loss))
        seconds.append(time.perf_counter() - start)
    return {
        "step_s": seconds,
        "losses": losses,
        "build_s": build_s,
        "build_peak_bytes": built_bytes,
        "peak_bytes": peak_bytes(device),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
