"""Linear layers of ZeRO-3 outside of graphs: torch's own results, where DeepSpeed rounds a product before its bias."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from engine.config.load import load
from engine.runtime import zero3
from tests.helpers.ranks import run_ranks
from tests.ranks.test_flat import WORDS, Run

pytestmark = pytest.mark.ranks

# Unclipped: the two take the norm in another order, and clipping would pass on its last bit.
BIASED = [*WORDS, "model.bias=true", "train.accum_steps=2", "kernels.compile=off", "optim.clip_norm=0"]


def trained(stage: str, words: list[str]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses and norms of four steps, of which all but the first have biases that are not zero, and masters."""
    run = Run(load([*BIASED, f"zero={stage}", *words]), 1, one_pass=True)
    return [run.step(number) for number in range(4)], run.weights()


def both(words: list[str]) -> list[Any]:
    return [trained("z1", words), trained("z3", words)]


@pytest.mark.parametrize("words", [[], ["train.recompute=full"]], ids=["kept", "recomputed"])
def test_the_bits_are_those_of_zero1(words: list[str]) -> None:
    (((curve, weights), (expected, others)),) = run_ranks(both, 1, (words,), timeout_s=120)
    for (loss, norm), (other, known) in zip(curve, expected, strict=True):
        assert loss == other
        assert norm == pytest.approx(known, rel=1e-6)
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def kept(as_torch: bool) -> tuple[int, int]:
    """Weights that a forward pass multiplied by, and how many of these the backward pass finds still whole."""
    run = Run(load([*BIASED, "zero=z3", "zero.bucket_elements=1"]), 2, one_pass=False)
    linear = zero3._torch_linear if as_torch else functional.linear
    seen: list[StorageWeakRef] = []
    found: list[tuple[int, int]] = []

    def recorded(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(StorageWeakRef(weight.untyped_storage()))
        return linear(input, weight, bias)

    def counted(*args: Any, **kwargs: Any) -> None:
        found.append((len(seen), sum(not one.expired() for one in seen)))
        return backward(*args, **kwargs)

    backward = torch.autograd.backward
    with mock.patch.object(functional, "linear", recorded), mock.patch.object(torch.autograd, "backward", counted):
        run.step(0)
    return found[0]


@pytest.mark.parametrize("as_torch", [False, True], ids=["ours", "torch's"])
def test_no_weight_stays_whole_after_its_product(as_torch: bool) -> None:
    for multiplied, whole in run_ranks(kept, 2, (as_torch,), timeout_s=120):
        assert multiplied >= 8
        assert (whole > 0) == as_torch
