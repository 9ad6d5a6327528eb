"""Training on a GPU in bf16 with compiled blocks: the loss falls, and is that of fp32 within bf16's reach."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from engine_kernels.ops import cudnn_attention, sdpa_attention
from engine_kernels.reference.attention import attention as reference
from tests.helpers.command import run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(folder: Path, *overrides: str) -> list[float]:
    common = ["model=gpt_tiny", "train.steps=30", "data.max_bytes=2000000", "run.name=r", "run.overwrite=true"]
    done = run_command([sys.executable, "-m", "engine.train", *common, *overrides], folder, 400)
    assert done.exit_code == 0, str(done)
    lines = (folder / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_bf16_compiled_training_follows_fp32(tmp_path: Path) -> None:
    fp32 = losses(tmp_path, "kernels.compile=off", "optim.lr=1e-3")
    bf16 = losses(tmp_path, "precision=bf16", "kernels.compile=on", "optim.lr=1e-3")
    assert fp32[-1] < fp32[0] - 1.0
    assert bf16[-1] == pytest.approx(fp32[-1], abs=0.05)
    assert bf16 != fp32


@pytest.mark.parametrize("attention", [cudnn_attention, sdpa_attention])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [64, 113, 1000])
def test_attention_within_twice_the_error_of_the_formula_in_bf16(attention, causal: bool, length: int) -> None:  # noqa: ANN001
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, length, n, 64, device="cuda") for n in (8, 4, 4))
    exact = reference(q.double(), k.double(), v.double(), causal=causal)
    low = [t.bfloat16() for t in (q, k, v)]
    got = attention(*low, causal=causal).double()
    direct = naive(*low, causal=causal).double()
    assert (got - exact).abs().max() <= 2 * (direct - exact).abs().max()


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """The formula with every step in bf16."""
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)
