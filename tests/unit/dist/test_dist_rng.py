from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.dist.context import SINGLE, AxisGroup, ParallelContext
from engine.dist.rng import ShardedRng, seed_everything, stream_seed
from engine.topology.grid import Coord

CPU = torch.device("cpu")


def axis(rank: int, size: int = 2) -> AxisGroup:
    return AxisGroup(rank=rank, size=size, ranks=tuple(range(size)), group=None)


def test_a_purpose_has_one_seed_of_63_bits() -> None:
    seeds = [stream_seed(seed, "init", f"block.{i}") for seed in range(20) for i in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62, "the high bits are used"
    assert seeds == [stream_seed(seed, "init", f"block.{i}") for seed in range(20) for i in range(20)]


def test_seeds_of_earlier_runs_stay_what_they_were() -> None:
    # Of the documented hash: another value means that no earlier run can be repeated.
    assert stream_seed(1234, "init", "embed.tokens.weight") == 380_837_671_629_745_231


def test_purposes_do_not_run_into_each_other() -> None:
    assert stream_seed(1, "dropout", 1, 2) != stream_seed(1, "dropout", 2, 1)
    assert stream_seed(1, "dropout", 12) != stream_seed(1, "dropout", 1, 2)
    assert stream_seed(11, "x") != stream_seed(1, "1", "x")


def draws(ctx: ParallelContext, seed: int = 5) -> tuple[float, float, float]:
    seed_everything(seed, ctx)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def at(pp: int, dp: int, tp: int) -> ParallelContext:
    return replace(ParallelContext.single(), coord=Coord(pp=pp, dp=dp, tp=tp))


def test_tensor_parallel_ranks_share_a_stream_replicas_and_stages_do_not() -> None:
    first = draws(at(0, 0, 0))
    assert draws(at(0, 0, 1)) == first
    others = [draws(at(1, 0, 0)), draws(at(0, 1, 0)), draws(at(1, 1, 0)), draws(at(0, 0, 0), seed=6)]
    for generator in range(3):
        assert len({first[generator], *(other[generator] for other in others)}) == 5


def test_the_sharded_stream_differs_by_rank_and_leaves_the_shared_one_alone() -> None:
    drawn = {}
    for rank in range(2):
        torch.manual_seed(3)
        rng = ShardedRng(axis(rank))
        shared = [torch.rand(4)]
        with rng.fork(CPU):
            own = [torch.rand(4)]
        shared.append(torch.rand(4))
        with rng.fork(CPU):
            own.append(torch.rand(4))
        drawn[rank] = torch.stack(own), torch.stack(shared)
    assert torch.equal(drawn[0][1], drawn[1][1]), "ranks agree outside"
    torch.manual_seed(3)
    assert torch.equal(drawn[0][1], torch.stack([torch.rand(4), torch.rand(4)])), "as if nothing was drawn inside"
    values = torch.cat([drawn[0][0].flatten(), drawn[1][0].flatten(), drawn[0][1].flatten()])
    assert values.unique().numel() == values.numel(), "the own streams go on, and meet no other"


def test_the_sharded_stream_follows_the_seed_of_the_run() -> None:
    def first(seed: int) -> float:
        torch.manual_seed(seed)
        with ShardedRng(SINGLE).fork(CPU):
            return float(torch.rand(()))

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_an_error_inside_gives_the_shared_stream_back() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), ShardedRng(axis(0)).fork(CPU):
        torch.rand(5)
        1 / 0  # noqa: B018
    assert torch.equal(torch.get_rng_state(), before)
