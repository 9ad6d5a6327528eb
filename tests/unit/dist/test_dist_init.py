"""Devices and agreement of the ranks, with what torch would answer put in its place."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.config import Device
from engine.config.enums import Transport, TpOverlap
from engine.config.launch_env import LaunchEnv
from engine.config.schema import ParallelConfig
from engine.dist import init
from engine.dist.context import ParallelContext
from engine.errors import LaunchError, Violation


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def refusal(caught: pytest.ExceptionInfo[LaunchError]) -> Violation:
    (violation,) = caught.value.violations
    return violation


@pytest.mark.parametrize(
    ("asked", "count", "found"),
    [(Device.auto, 0, "cpu"), (Device.auto, 2, "cuda"), (Device.cpu, 2, "cpu"), (Device.cuda, 2, "cuda")],
)
def test_device_type(monkeypatch: pytest.MonkeyPatch, asked: Device, count: int, found: str) -> None:
    gpus(monkeypatch, count)
    assert init.resolve_device_type(asked) == found


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(LaunchError) as caught:
        init.resolve_device_type(Device.cuda)
    assert str(refusal(caught)) == (
        "[OCT510] train.device=cuda: no CUDA device is visible to this process. Use train.device=cpu or auto"
    )


def test_each_local_rank_has_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    assert init.local_device("cuda", 1) == torch.device("cuda", 1)
    assert init.local_device("cpu", 5) == torch.device("cpu")


def test_more_local_ranks_than_cards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 2)
    with pytest.raises(LaunchError) as caught:
        init.local_device("cuda", 2)
    text = str(refusal(caught))
    assert text.startswith("[OCT511] LOCAL_RANK=2: this host shows 2 GPUs and each local rank needs its own.")
    assert text.endswith("Start at most 2 ranks on this host, or use train.device=cpu")


@pytest.mark.parametrize(("asked", "cores", "ranks", "found"), [(3, 8, 2, 3), (None, 8, 2, 4), (None, 2, 8, 1)])
def test_threads_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, cores: int, ranks: int, found: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert init.cpu_threads(asked, ranks) == found


@pytest.mark.parametrize(
    ("parallel", "zero_stage", "connections"),
    [
        (ParallelConfig(tp=2), 1, "1"),
        (ParallelConfig(tp=2, tp_overlap=TpOverlap.chunked), 2, "1"),
        (ParallelConfig(tp=2, tp_overlap=TpOverlap.symmetric), 1, None),
        (ParallelConfig(tp=2, tp_overlap=TpOverlap.none), 1, None),
        (ParallelConfig(tp=2, pp=2), 1, None),
        (ParallelConfig(pp=2, pipeline_transport=Transport.copy_engine), 1, "32"),
        (ParallelConfig(tp=2), 3, None),
        (ParallelConfig(), 1, None),
    ],
)
def test_queues_of_launches(
    monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig, zero_stage: int, connections: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {})
    init.order_launches(parallel, zero_stage)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == connections
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "4"
    init.order_launches(parallel, zero_stage)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "4"


def test_the_rank_is_exported_for_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"SLURM_PROCID": "3"})
    env = LaunchEnv(
        rank=3, world_size=8, local_rank=1, local_world_size=2, master_addr="a", master_port=29, launcher="slurm"
    )
    init.export(env)
    assert os.environ == {
        "SLURM_PROCID": "3",
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "29",
    }


def ranks_hold(monkeypatch: pytest.MonkeyPatch, *values: tuple[str, str]) -> None:
    def gather(everyone: list[Any], mine: tuple[str, str]) -> None:
        assert mine == values[0]
        everyone[:] = values

    monkeypatch.setattr(dist, "get_world_size", lambda: len(values))
    monkeypatch.setattr(dist, "all_gather_object", gather)


def test_equal_ranks_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_hold(monkeypatch, ("c", "d"), ("c", "d"))
    init.require_equal_config("c", "d")


def test_ranks_with_another_config_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_hold(monkeypatch, ("c", "d"), ("x", "d"), ("c", "d"), ("y", "z"))
    with pytest.raises(LaunchError) as caught:
        init.require_equal_config("c", "d")
    assert str(refusal(caught)) == (
        "[OCT512] config=c: ranks [1, 3] were started with another configuration than rank 0. "
        "Start every rank with the same overrides and conf/ folder"
    )


def test_ranks_with_other_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_hold(monkeypatch, ("c", "d"), ("c", "d"), ("c", "e"))
    with pytest.raises(LaunchError) as caught:
        init.require_equal_config("c", "d")
    text = str(refusal(caught))
    assert text.startswith("[OCT514] data.source=d: ranks [2] were started with other data than rank 0.")
    assert text.endswith("Put the same corpus, and the same Python for data=python, on every host")


def test_a_single_process_is_alone_on_every_axis() -> None:
    ctx = ParallelContext.single()
    assert ctx.is_main
    for axis in (ctx.pp, ctx.dp, ctx.cp, ctx.tp, ctx.replica, ctx.reduce):
        assert axis.is_first
        assert axis.group is None
