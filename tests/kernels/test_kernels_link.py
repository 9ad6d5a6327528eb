"""Messages of a rank that is alone: what the kernels write, whatever the dtype, the length and the address."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine_kernels.triton.link import Link

LINK = Link(None, programs=3)
COUNTS = [1, 2, 257, 4 * 2**13 + 3]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64]


def drawn(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (100 * torch.randn(count, generator=torch.Generator().manual_seed(count))).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1), (5, 3)])
def test_a_gather_repeats_what_the_rank_has(ranks: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    for count in COUNTS:
        own = drawn(count, dtype, device)
        target = torch.zeros(ranks * count + 2, dtype=dtype, device=device)
        LINK.gather(own, target[1:-1], rank)
        assert torch.equal(target[1:-1], own.repeat(ranks)), count
        assert not target[[0, -1]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1), (5, 3)])
def test_a_sum_is_the_own_part_as_often_as_there_are_ranks(
    ranks: int, rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    for count in COUNTS:
        source, target = drawn(ranks * count, dtype, device), torch.zeros(count + 2, dtype=dtype, device=device)
        LINK.reduce_scatter(source, target[1:-1], rank, ranks)
        part = source[rank * count : (rank + 1) * count]
        wanted = part * ranks if dtype in (torch.float64, torch.int64) else (part.float() * ranks).to(dtype)
        assert torch.equal(target[1:-1], wanted), count
        assert not target[[0, -1]].any()


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_all_reduce_is_in_place(dtype: torch.dtype, factor: int, device: torch.device) -> None:
    for count in COUNTS:
        whole = drawn(count + 2, dtype, device)
        before = whole.clone()
        LINK.scale(whole[1:-1], factor)
        assert torch.equal(whole[[0, -1]], before[[0, -1]])
        assert torch.equal(whole[1:-1], before[1:-1] * factor), count


def test_what_another_part_has_that_is_no_number_is_seen(device: torch.device) -> None:
    source, target = torch.ones(6, device=device), torch.zeros(3, device=device)
    source[4] = math.nan
    LINK.reduce_scatter(source, target, 0, 2)
    assert torch.equal(target.isnan(), torch.tensor([False, True, False], device=device))


def test_nothing_is_sent_of_nothing(device: torch.device) -> None:
    empty = torch.zeros(0, device=device)
    LINK.gather(empty, empty.clone(), 0)
    LINK.reduce_scatter(empty, empty.clone(), 0, 2)
    LINK.scale(empty, 2)
