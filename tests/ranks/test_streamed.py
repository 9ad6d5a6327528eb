"""AdamW's state streamed to host memory: the steps of the device, all of it or a share, at once or one step late."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.load import load
from engine.runtime.flat import FlatOptimizer
from tests.helpers.ranks import run_ranks
from tests.ranks.test_flat import WORDS, Run, dropped
from tests.ranks.test_kernels_resume import rows, train

pytestmark = pytest.mark.ranks

HOST = "zero.offload_optimizer=cpu"
Outcome = tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, Tensor], list[int]]


def outcomes(cases: list[tuple[str, ...]], world: int, rate: float = 1e-2) -> list[Outcome]:
    """Of four steps of each case: losses and norms, masters, copies, elements of this rank's in host memory."""
    found = []
    for words in cases:
        run = Run(load([*WORDS, *words]), world, one_pass=True)
        curve = [run.step(number, rate) for number in range(4)]
        optimizer: Any = run.engine._ds.optimizer
        assert isinstance(optimizer, FlatOptimizer)
        sizes = [tensor.numel() for stretches in optimizer.stretches() for _, tensor in stretches[1:]]
        found.append((curve, run.weights(), run.copies(), sizes))
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - value).square().sum()) for name, value in other.items()))


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2, ("train.accum_steps=2", "zero.bucket_elements=9000")),
        (2, ("parallel.pp=2", "parallel.dp=1", "train.accum_steps=2")),
        (1, ("precision.states=bf16",)),
    ],
    ids=["dp2", "pp2", "bf16 states"],
)
def test_host_steps_are_the_steps_of_the_device(world: int, words: tuple[str, ...]) -> None:
    shares = [(), (HOST,), (HOST, "zero.offload_ratio=0.3")]
    for device, *hosts in run_ranks(outcomes, world, ([(*words, *share) for share in shares], world)):
        curve, masters, _, on_host = device
        assert not on_host
        moved = distance(masters, dict.fromkeys(masters, torch.zeros(())))
        for share, (theirs, held, copies, sizes) in zip((1.0, 0.3), hosts, strict=True):
            assert theirs[0] == curve[0]
            for mine, there in zip(curve, theirs, strict=True):
                assert there == pytest.approx(mine, rel=2e-3)
            # bf16 gradients of weights that were rounded otherwise once in a while.
            assert distance(held, masters) <= 2e-2 * moved
            assert all(torch.equal(copies[name], master.bfloat16()) for name, master in held.items())
            whole = sum(sizes) / share
            assert (sum(size > 0 for size in sizes), whole) == (len(sizes), pytest.approx(whole, abs=2))


def test_late_weights_lag_by_one_step() -> None:
    late = (HOST, "zero.offload_delay=1", "train.accum_steps=2")
    ((curve, masters, copies, _),) = run_ranks(outcomes, 2, ([late], 2))[0]
    ((still, _, _, _),) = run_ranks(outcomes, 2, ([late], 2, 0.0))[0]
    assert curve[:2] == still[:2], "the second step's passes use the first weights"
    assert curve[2] != still[2]
    assert all(torch.equal(copies[name], master.bfloat16()) for name, master in masters.items())


@pytest.mark.parametrize("delay", [0, 1])
def test_a_step_that_is_not_finite_is_dropped_on_the_host(delay: int) -> None:
    for norm, stayed, counted in run_ranks(dropped, 2, (2, HOST, f"zero.offload_delay={delay}")):
        assert norm == float("inf")
        assert stayed
        assert counted == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("more", [(), ("zero.offload_delay=1", "zero.offload_ratio=0.6")], ids=["at once", "late"])
def test_it_goes_on_to_the_last_bit(more: tuple[str, ...], tmp_path: Path) -> None:
    how = ("precision=bf16", "zero=z1", HOST, *more)
    train(tmp_path, "whole", *how)
    load_words = f"checkpoint.load={tmp_path / 'whole' / 'checkpoints' / 'step-00000002'}"
    train(tmp_path, "second-half", *how, load_words)
    assert rows(tmp_path / "second-half") == rows(tmp_path / "whole")[2:]
    train(tmp_path, "on-device", "precision=bf16", "zero=z1", load_words)
    assert rows(tmp_path / "on-device")[0] == pytest.approx(rows(tmp_path / "whole")[2], rel=1e-6)
