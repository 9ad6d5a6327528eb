"""`run_ranks`: results in order, the first failure raised here, no waiting for ranks that hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.ranks


def total(value: float) -> tuple[int, float]:
    x = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(x)
    return dist.get_rank(), float(x)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"planted on rank {rank}")
    dist.barrier()


def hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def die() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def test_results_come_in_rank_order() -> None:
    assert run_ranks(total, 3, (2.0,)) == [(0, 12.0), (1, 12.0), (2, 12.0)]


def test_first_traceback_is_raised_here() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1:\n(.|\n)*ValueError: planted on rank 1"):
        run_ranks(fail_on, 2, (1,))
    assert time.monotonic() - start < 30, "the other rank was waited for"


def test_hanging_rank_shows_its_stack() -> None:
    with pytest.raises(RankFailure, match=r"still running after 5 s(.|\n)*in hang"):
        run_ranks(hang, 2, timeout_s=5)


def test_dead_rank_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 \(exit code 7\)"):
        run_ranks(die, 2)


def test_ranks_on_cpus_are_deepspeeds_too_where_a_gpu_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    run_ranks(os.getpid, 1)
    # What the server of ranks starts with, and then imports DeepSpeed.
    assert os.environ["DS_ACCELERATOR"] == "cpu"
