"""Gradients added to sums of another dtype: the bits that torch gives, and nothing beyond."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_kernels import plain
from engine_kernels.ops import accumulation
from engine_kernels.triton import accumulate as module
from engine_kernels.triton.accumulate import accumulate

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(FP32, BF16), (FP32, FP16), (BF16, FP32), (FP16, FP32), (BF16, FP16), (FP32, FP32), (BF16, BF16)]
SHAPES = [(1,), (0,), (), (7, 13), (module._BLOCK,), (2 * module._BLOCK + 5,)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
def test_the_bits_are_torchs(dtypes: tuple[torch.dtype, torch.dtype], first: bool, device: torch.device) -> None:
    for shape in SHAPES:
        total, x = drawn(shape, dtypes[0], device, 1), drawn(shape, dtypes[1], device, 2)
        if first:
            total.fill_(math.nan)
        wanted = x.to(dtypes[0]) if first else (total.float() + x.float()).to(dtypes[0])
        accumulate(total, x, first=first)
        assert torch.equal(total, wanted), shape


@pytest.mark.parametrize("first", [True, False])
def test_only_the_sum_is_written_at_any_address(first: bool, device: torch.device) -> None:
    whole, x = drawn((9002,), FP32, device, 3), drawn((9004,), BF16, device, 4)
    before = whole.clone()
    accumulate(whole[1:-1], x[3:-1], first=first)
    assert torch.equal(whole[[0, -1]], before[[0, -1]])
    assert torch.equal(whole[1:-1], x[3:-1].float() if first else before[1:-1] + x[3:-1].float())


@pytest.mark.parametrize("transposed", ["total", "x"])
def test_gaps_in_memory_are_torchs(transposed: str, device: torch.device) -> None:
    total, x = drawn((6, 8), FP32, device, 5), drawn((6, 8), BF16, device, 6)
    if transposed == "total":
        total = total.t().contiguous().t()
    else:
        x = x.t().contiguous().t()
    wanted = total + x.float()
    accumulate(total, x, first=False)
    assert torch.equal(total, wanted)


def test_what_is_not_finite_is_kept(device: torch.device) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0], device=device, dtype=BF16)
    total = torch.tensor([1.0, math.inf, 0.0, math.nan], device=device)
    wanted = total + x.float()
    accumulate(total, x, first=False)
    torch.testing.assert_close(total, wanted, rtol=0, atol=0, equal_nan=True)


def test_the_kernel_is_launched_where_dtypes_differ(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def torchs(*args: Any, **options: Any) -> None:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(plain, "accumulate", torchs)
    total = torch.zeros(5, device=device)
    accumulate(total, torch.ones(5, device=device, dtype=BF16), first=False)
    assert total.tolist() == [1.0] * 5
    with pytest.raises(AssertionError, match="torch was asked"):
        accumulate(total, torch.ones(5, device=device), first=False)


def test_gpus_have_the_kernel_and_cpus_have_torch(device: torch.device) -> None:
    assert accumulation(device) is (accumulate if device.type == "cuda" else plain.accumulate)
