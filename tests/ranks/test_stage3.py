"""Our gradients of ZeRO-3 next to DeepSpeed's: the same bits, with each gradient reduced alone or together."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage3 as theirs

from engine.config import derived
from engine.config.load import load
from engine.runtime import ds_config, ds_engine
from engine.runtime.stage3 import Stage3
from tests.helpers.ranks import run_ranks
from tests.ranks.test_flat import WORDS, Run

pytestmark = pytest.mark.ranks


def trained(words: list[str], ours: bool, refuse: bool) -> tuple[list[tuple[float, float]], dict[str, Any], str]:
    """Losses and norms of three steps, weights after them, and the optimizer's class."""
    with ExitStack() as stack:
        if not ours:
            for module in (derived, ds_config, ds_engine):
                stack.enter_context(mock.patch.object(module, "has_own_stage3", lambda cfg: False))
        if refuse:
            copying = AssertionError("gradients were copied together")
            stack.enter_context(mock.patch.object(theirs, "reduce_scatter_coalesced", side_effect=copying))
        run = Run(load([*WORDS, "zero=z3", "train.accum_steps=2", *words]), dist.get_world_size(), one_pass=False)
        curve = [run.step(number) for number in range(3)]
        return curve, run.weights(), type(run.engine._ds.optimizer).__name__


def both(words: list[str], alone: bool) -> list[Any]:
    return [trained(words, ours=True, refuse=alone), trained(words, ours=False, refuse=False)]


@pytest.mark.parametrize(("words", "alone"), [([], True), (["precision=fp32"], False)], ids=["bf16", "fp32"])
def test_the_bits_are_deepspeeds(words: list[str], alone: bool) -> None:
    size = "zero.bucket_elements=1" if alone else "zero.bucket_elements=100000"
    for (curve, weights, kind), (expected, others, other) in run_ranks(both, 2, ([*words, size], alone), timeout_s=200):
        assert (kind, other) == (Stage3.__name__, "DeepSpeedZeroOptimizer_Stage3")
        assert curve == expected
        assert curve[0] != curve[2]
        for name, value in weights.items():
            assert torch.equal(value, others[name]), name


def test_three_ranks_that_divide_nothing_evenly() -> None:
    """Shards end in padding, and of the smallest parameters some ranks have none."""
    words = ["model.hidden_size=32", "model.num_heads=4", "model.bias=true", "zero.bucket_elements=1"]
    for (curve, weights, _), (expected, others, _) in run_ranks(both, 3, (words, False), timeout_s=200):
        assert curve == expected
        assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_offload_keeps_deepspeeds() -> None:
    ((_, _, kind),) = run_ranks(trained, 1, (["zero=z3_offload", "precision=fp32"], True, False), timeout_s=200)
    assert kind == "DeepSpeedZeroOptimizer_Stage3"
