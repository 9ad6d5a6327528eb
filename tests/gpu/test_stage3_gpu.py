"""ZeRO-3 on a GPU: the host waits in a step only, and a step for what the last backward pass left under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch

from engine.config.load import load
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


def done(method: Any) -> Any:
    """`method`, after which the host waits for the device."""

    def entered(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        torch.cuda.synchronize()
        return result

    return entered


def trained(name: str, how: Callable[[Any], Any]) -> tuple[list[Any], dict[str, Any]]:
    """Losses and norms of four steps, and masters after them."""
    with mock.patch.object(Stage3, name, how(getattr(Stage3, name))):
        run = Run(load([*WORDS, *CUDA, *SIZES]), 1, one_pass=False, device=torch.device("cuda", 0))
        assert isinstance(run.engine._ds.optimizer, Stage3)
        curve = [run.step(number) for number in range(4)]
        return curve, {name: value.cpu() for name, value in run.weights().items()}


def both() -> list[Any]:
    return [trained("partition_grads", late), trained("independent_gradient_partition_epilogue", done)]


def test_a_step_waits_for_sums_that_are_late() -> None:
    (((curve, weights), (expected, others)),) = run_ranks(both, 1, backend="nccl", timeout_s=200)
    assert curve == expected
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


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
