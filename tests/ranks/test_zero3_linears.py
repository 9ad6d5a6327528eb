"""Linear layers of ZeRO-3 outside of graphs: torch's own results, where DeepSpeed rounds a product before its bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.load import load
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
