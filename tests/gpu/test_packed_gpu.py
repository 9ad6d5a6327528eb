"""Masked documents on a GPU: the variable-length kernel, the path by length, and a training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.data.loader import Loader
from engine.model.batch import Batch
from engine_kernels import packed
from engine_kernels.ops import Documents, sdpa_attention
from engine_kernels.reference.attention import attention as reference
from tests.helpers.command import run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
S = 515
LENGTHS = [[1, 130, 384], [515], [257, 255, 3]]


def documents() -> Documents:
    flat = [length for row in LENGTHS for length in row]
    return Documents(torch.tensor([0, *flat]).cumsum(0).int(), max(flat)).to(torch.device("cuda"))


def forward_backward(fn: Any, values: list[Tensor], **options: Any) -> list[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in values[:3])
    out = fn(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3].to(out.dtype))]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_as_near_to_fp64_as_torch_with_a_mask(dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    generator = torch.Generator("cuda").manual_seed(head_dim)
    exact = [
        torch.randn(3, S, n, head_dim, generator=generator, device="cuda", dtype=torch.float64)
        for n in (heads[0], heads[1], heads[1], heads[0])
    ]
    values = [x.to(dtype) for x in exact]
    exact = [x.double() for x in values]
    seen = torch.ones(S, S, dtype=torch.bool, device="cuda").tril().repeat(3, 1, 1)
    for row, parts in enumerate(LENGTHS):
        number = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts)).cuda()
        seen[row] &= number[:, None] == number

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads[0] // heads[1], 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None]).transpose(1, 2)

    refusal = packed.varlen_refuses(values[0].device, dtype, head_dim)
    assert (refusal is None) == (dtype is not torch.float32)
    want = forward_backward(reference, exact, causal=True, documents=documents())
    mine = forward_backward(sdpa_attention, values, causal=True, documents=documents())
    torchs = forward_backward(masked, values)
    for name, got, other, true in zip(("out", "q", "k", "v"), mine, torchs, want, strict=True):
        error, base = ((x.double() - true).norm() / true.norm() for x in (got, other))
        assert error <= 2 * base, f"{name}: {error:.2e}, torch {base:.2e}"


def test_batches_wait_in_page_locked_memory() -> None:
    def read(first: int) -> list[Batch]:
        numbers = torch.arange(first, first + 4)
        starts = Documents(torch.tensor([0, 3, 8], dtype=torch.int32), 5)
        return [Batch(tokens_BS=numbers[:, None] * 2, labels_BS=numbers[:, None], samples_B=numbers, documents=starts)]

    with Loader(read, [0, 4, 8], prefetch=2, device=torch.device("cuda", 0)) as batches:
        for first, (batch,) in zip((0, 4, 8), batches, strict=True):
            assert batch.tokens_BS.is_pinned() and batch.labels_BS.is_pinned() and batch.samples_B.is_pinned()
            assert batch.documents is not None and batch.documents.starts.is_pinned()
            moved = batch.to(torch.device("cuda", 0))
            assert moved.tokens_BS.flatten().tolist() == list(range(2 * first, 2 * first + 8, 2))


def test_masked_documents_train_compiled_in_bf16(tmp_path: Path) -> None:
    words = ["model=gpt_tiny", "train.steps=30", "data.max_bytes=2000000", "data.document_mask=true", "optim.lr=1e-3"]
    found = {}
    for name, more in {"fp32": ["kernels.compile=off"], "bf16": ["precision=bf16", "kernels.compile=on"]}.items():
        done = run_command([sys.executable, "-m", "engine.train", *words, *more, f"run.name={name}"], tmp_path, 400)
        assert done.exit_code == 0, str(done)
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert found["fp32"][-1] < found["fp32"][0] - 1.0
    assert found["bf16"][-1] == pytest.approx(found["fp32"][-1], abs=0.05)
