"""Streamed offload on a GPU: side streams and the host's thread keep to the order of the passes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.optim.flat_adamw import FlatAdamW
from engine.runtime.host_step import HostStep, Part, Streamed
from engine_kernels.reference.adamw import adamw_step
from tests.helpers.command import run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZE, CHUNK = 3_000_000, 2**18
"""Twelve chunks, the last one shorter: more than there are slots."""
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def stepped(device: torch.device, *, delayed: bool, dtype: torch.dtype) -> list[Tensor]:
    """The model's weights after each of four steps, with new gradients written as soon as they may be."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(SIZE, generator=generator)
    gradients = [torch.randn(SIZE, generator=generator).to(device, dtype) for _ in range(4)]
    optimizer = FlatAdamW([{"params": [start.clone()], "weight_decay": 0.1}], update=adamw_step, **without_decay())
    group = optimizer.param_groups[0]
    part = Part(group, group["params"][0], torch.empty(SIZE, device=device, dtype=dtype), start.bfloat16().to(device))
    host = HostStep(optimizer, [part], device, Streamed(1.0, delayed=delayed, chunk=CHUNK))
    found = []
    for gradient in gradients:
        if device.type == "cuda":
            # The backward pass is still under way when the step is begun.
            torch.cuda._sleep(20_000_000)
        part.gradient.copy_(gradient)
        host.begin(torch.tensor(0.5, device=device))
        if delayed:
            host.release_gradients()
            part.gradient.fill_(float("nan"))
        host.finish()
        found.append(part.weights.clone().cpu())
    return found


def without_decay() -> dict[str, Any]:
    return {name: value for name, value in OPTIONS.items() if name != "weight_decay"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delayed", [False, True])
def test_chunks_go_and_come_in_order(delayed: bool, dtype: torch.dtype) -> None:
    got = stepped(torch.device("cuda", 0), delayed=delayed, dtype=dtype)
    want = stepped(torch.device("cpu"), delayed=delayed, dtype=dtype)
    for mine, cpus in zip(got, want, strict=True):
        assert torch.equal(mine, cpus)


def losses(folder: Path, name: str, *words: str) -> list[float]:
    common = ["model=gpt_tiny", "train.steps=12", "data.max_bytes=2000000", "precision=bf16", f"run.name={name}"]
    command = [sys.executable, "-m", "engine.train", *common, "train.accum_steps=2", "optim.lr=1e-3", *words]
    done = run_command(command, folder, 400)
    assert done.exit_code == 0, str(done)
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_training_is_that_of_the_device(tmp_path: Path) -> None:
    device = losses(tmp_path, "device", "zero=z1")
    for share in ("1", "0.4"):
        streamed = losses(tmp_path, f"share-{share}", "zero=z1_offload", f"zero.offload_ratio={share}")
        assert streamed == pytest.approx(device, rel=5e-3)
    late = losses(tmp_path, "late", "zero=z1_offload", "zero.offload_ratio=1", "zero.offload_delay=1")
    assert late[-1] < late[0] - 0.2
    chosen = losses(tmp_path, "chosen", "zero=z1_offload")
    assert chosen == device, "all of it fits, so nothing is offloaded"
