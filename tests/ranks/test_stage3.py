"""Our gradients and steps of ZeRO-3 next to DeepSpeed's: the same bits, with either AdamW and either reduction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage3 as theirs
from torch import Tensor, nn

from engine.config import derived
from engine.config.load import load
from engine.runtime import ds_config, ds_engine
from engine.runtime.stage3 import Stage3
from tests.helpers.ranks import run_ranks
from tests.ranks.test_flat import WORDS, Run

pytestmark = pytest.mark.ranks


def trained(words: list[str], ours: bool, refuse: bool, one_pass: bool) -> tuple[list[Any], dict[str, Any], str]:
    """Losses and norms of three steps, weights after them and the model's copies, and the optimizer's class."""
    with ExitStack() as stack:
        if not ours:
            for module in (derived, ds_config, ds_engine):
                stack.enter_context(mock.patch.object(module, "has_own_stage3", lambda cfg: False))
        if refuse:
            copying = AssertionError("gradients were copied together")
            stack.enter_context(mock.patch.object(theirs, "reduce_scatter_coalesced", side_effect=copying))
        run = Run(load([*WORDS, "zero=z3", "train.accum_steps=2", *words]), dist.get_world_size(), one_pass=one_pass)
        if ours and one_pass:
            copying = AssertionError("sums were copied, or scaled apart")
            stack.enter_context(mock.patch.object(run.engine._ds.optimizer, "flatten", side_effect=copying))
            stack.enter_context(mock.patch.object(run.engine._ds.optimizer.optimizer, "step", side_effect=copying))
        curve = [run.step(number) for number in range(3)]
        weights = run.weights() | dict(shards(run.engine._ds.module))
        return curve, weights, type(run.engine._ds.optimizer).__name__


def shards(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the model computes with, of this rank, without the padding, which nobody sets."""
    for parameter in model.parameters():
        part = parameter.ds_tensor
        left = parameter.ds_numel - part.numel() * dist.get_rank(parameter.ds_process_group)
        yield f"shard of {parameter.logical.name}", part[: max(0, left)].clone()


def both(words: list[str], alone: bool, one_pass: bool) -> list[Any]:
    return [trained(words, True, alone, one_pass), trained(words, False, False, one_pass)]


def agree(ours: tuple[list[Any], dict[str, Any], str], expected: tuple[list[Any], dict[str, Any], str]) -> None:
    assert (ours[2], expected[2]) == (Stage3.__name__, "DeepSpeedZeroOptimizer_Stage3")
    for (loss, norm), (other, theirs_) in zip(ours[0], expected[0], strict=True):
        assert loss == other
        # Squares are added up in another order, in fp64.
        assert norm == pytest.approx(theirs_, rel=1e-7)
    assert ours[0][0] != ours[0][2]
    for name, value in ours[1].items():
        assert torch.equal(value, expected[1][name]), name


# The first step of fp16 overflows.
@pytest.mark.parametrize(
    ("words", "alone", "one_pass"),
    [
        ([], True, False),
        ([], False, True),
        (["precision=fp32"], False, True),
        (["precision=fp16", "precision.initial_scale_power=20"], False, True),
    ],
    ids=["torch", "bf16", "fp32", "fp16"],
)
def test_the_bits_are_deepspeeds(words: list[str], alone: bool, one_pass: bool) -> None:
    size = "zero.bucket_elements=1" if alone else "zero.bucket_elements=100000"
    for ours, expected in run_ranks(both, 2, ([*words, size], alone, one_pass), timeout_s=200):
        agree(ours, expected)


def test_three_ranks_that_divide_nothing_evenly() -> None:
    """Shards end in padding, and of the smallest parameters some ranks have none."""
    words = ["model.hidden_size=32", "model.num_heads=4", "model.bias=true", "zero.bucket_elements=1"]
    for ours, expected in run_ranks(both, 3, (words, False, True), timeout_s=200):
        agree(ours, expected)


def test_one_rank_has_nothing_to_gather_or_scatter() -> None:
    ((ours, expected),) = run_ranks(both, 1, (["zero.bucket_elements=100000"], True, True), timeout_s=200)
    agree(ours, expected)


def test_whole_parameters_of_tensor_parallel_ranks_count_once() -> None:
    for ours, expected in run_ranks(both, 2, (["parallel.tp=2"], False, True), timeout_s=200):
        agree(ours, expected)


def test_offload_keeps_deepspeeds() -> None:
    ((_, _, kind),) = run_ranks(trained, 1, (["zero=z3_offload", "precision=fp32"], True, False, False), timeout_s=200)
    assert kind == "DeepSpeedZeroOptimizer_Stage3"
