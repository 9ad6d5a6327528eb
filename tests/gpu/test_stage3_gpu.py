"""ZeRO-3 on a GPU next to DeepSpeed's: a step waits for what the last pass left under way, the host in a step only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import derived
from engine.config.load import load
from engine.dist.context import ParallelContext
from engine.runtime import ds_config, ds_engine, stage3
from engine.runtime.stage3 import Stage3
from tests.helpers.ranks import run_ranks
from tests.ranks.test_flat import WORDS, Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = ["zero=z3", "train.accum_steps=3", "train.device=cuda", "kernels.deterministic=true", "kernels.compile=off"]
SIZES = ["model.hidden_size=512", "model.num_layers=4"]
SLEEP = 20_000_000
"""Clock cycles, some ten milliseconds: longer than a pass takes."""


def late(method: Any) -> Any:
    """`method`, before which the stream that it works on does nothing for a while."""

    def entered(*args: Any, **kwargs: Any) -> Any:
        torch.cuda._sleep(SLEEP)
        return method(*args, **kwargs)

    return entered


def exact_norm(shards: Iterable[Tensor], ctx: ParallelContext) -> Tensor:
    """The norm as DeepSpeed takes it: in fp64, where ours adds up in fp32 on a GPU."""
    total = sum((shard.double().square().sum() for shard in shards), torch.zeros((), device=ctx.device))
    dist.all_reduce(total)
    return total.sqrt()


def trained(ours: bool, exact: bool) -> tuple[list[Any], dict[str, Any]]:
    """Losses and norms of four steps, and masters after them; ours with sums that are late."""
    with ExitStack() as stack:
        if ours:
            stack.enter_context(mock.patch.object(Stage3, "partition_grads", late(Stage3.partition_grads)))
        else:
            for module in (derived, ds_config, ds_engine):
                stack.enter_context(mock.patch.object(module, "has_own_stage3", lambda cfg: False))
        if exact:
            stack.enter_context(mock.patch.object(stage3, "norm_of_shards", exact_norm))
        run = Run(load([*WORDS, *CUDA, *SIZES]), 1, one_pass=False, device=torch.device("cuda", 0))
        assert isinstance(run.engine._ds.optimizer, Stage3) == ours
        curve = [run.step(number) for number in range(4)]
        return curve, {name: value.cpu() for name, value in run.weights().items()}


def three() -> list[Any]:
    return [trained(True, True), trained(True, False), trained(False, False)]


def test_the_bits_are_deepspeeds_when_sums_are_late() -> None:
    ((exact, ours, theirs),) = run_ranks(three, 1, backend="nccl", timeout_s=200)
    for (loss, norm), (other, expected) in zip(exact[0], theirs[0], strict=True):
        assert loss == other
        assert norm == pytest.approx(expected, rel=1e-12)
    assert all(torch.equal(value, theirs[1][name]) for name, value in exact[1].items())
    # With the norm as it is: the gradients of the first step are equal, so the norm says how it is rounded.
    (loss, norm), (other, expected) = ours[0][0], theirs[0][0]
    assert loss == other
    assert norm == pytest.approx(expected, rel=1e-6)


def waits() -> Counter[str]:
    """How often the host waits for the device in a step of three passes, by what it calls; no norm is read."""
    run = Run(load([*WORDS, *CUDA, *SIZES]), 1, one_pass=False, device=torch.device("cuda", 0))
    run.step(0)
    run.step(1)
    found: Counter[str] = Counter()
    with ExitStack() as stack:
        for place, name in (
            (torch.cuda.Stream, "synchronize"),
            (torch.cuda.Event, "synchronize"),
            (torch.cuda, "synchronize"),
        ):
            method = getattr(place, name)

            def counted(*args: Any, _name: str = place.__name__, _method: Any = method) -> Any:
                found[_name] += 1
                return _method(*args)

            stack.enter_context(mock.patch.object(place, name, counted))
        run.engine.train_step(run._batches(2), 1e-2)
    return found


def test_the_host_waits_in_a_step_only() -> None:
    (found,) = run_ranks(waits, 1, backend="nccl", timeout_s=120)
    assert found <= Counter({"torch.cuda": 1}), found
