"""The plain PyTorch loop that Octant is measured against: same model, same random tokens, no DeepSpeed.

python -m benchmarks.step.plain OUT.json [--profile FOLDER] [overrides of engine.train]

bf16 weights and bf16 optimizer moments, blocks and loss compiled, torch's fused AdamW, clipping by torch's
`clip_grad_norm_`: what one would write by hand for a single GPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from engine.config.load import load
from engine.config.schema import Config
from engine.data import open_data
from engine.dist.context import ParallelContext
from engine.dist.init import local_device, resolve_device_type
from engine.model.batch import Batch
from engine.model.build import build_layers, build_loss
from engine.model.layers import build_stacks, random_weights
from engine.optim.groups import build_optimizer
from engine.optim.schedule import learning_rate, set_learning_rate
from engine.runtime.compile import compile_parts, wants_compile
from engine.runtime.steps import make_feeds
from engine.train.hooks import Profile
from engine.train.kernels import choose_kernels


class PlainLoop:
    """One GPU, one process."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        ctx = ParallelContext.single(device)
        layers = build_layers(cfg, ctx, choose_kernels(cfg, device).kernels)
        (model,) = build_stacks(layers, [(0, len(layers))], random_weights(cfg.train.seed), tp=ctx.tp)
        self._model = model.to(device, torch.bfloat16)
        self._loss = build_loss(cfg, ctx)
        if wants_compile(cfg, device):
            compile_parts(self._model, self._loss)
        self._optimizer = build_optimizer(self._model.parameters(), cfg.optim, ctx)
        self._cfg, self._ctx = cfg, ctx

    def step(self, batches: Iterable[Batch], lr: float) -> Tensor:
        """One optimizer step; the mean loss, on the device."""
        set_learning_rate(self._optimizer, lr)
        total = torch.zeros((), device=self._ctx.device)
        for feed in make_feeds(batches, self._cfg, self._ctx):
            loss = self._loss(self._model(None, feed), feed)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._cfg.optim.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


def main(argv: list[str]) -> None:
    """Time every step and write seconds, losses and peak memory as JSON."""
    out, rest = Path(argv[0]), argv[1:]
    folder = Path(rest[rest.index("--profile") + 1]) if "--profile" in rest else None
    cfg = load([word for word in rest if word != "--profile" and word != str(folder)])
    device = local_device(resolve_device_type(cfg.train.device), 0)
    train = cfg.train
    loop, split = PlainLoop(cfg, device), open_data(cfg.data, cfg.model).train
    profile = Profile(cfg, folder) if folder is not None else None
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
        loss = loop.step(batches, learning_rate(cfg.optim, step, train.steps))
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
        if profile is not None:
            profile.after_finished_step(step + 1)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    out.write_text(json.dumps({"step_s": seconds, "losses": losses, "peak_memory_gib": peak}))


if __name__ == "__main__":
    main(sys.argv[1:])
