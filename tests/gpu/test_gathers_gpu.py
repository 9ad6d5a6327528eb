"""New weights that arrive beside the forward pass: the bits of those that all wait for, however late."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from engine.config.load import load
from engine.runtime import flat
from engine.runtime.gathers import Gathers
from tests.helpers.ranks import backend_of, run_ranks
from tests.ranks.test_flat import WORDS, Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = [
    "model.hidden_size=512",
    "train.device=cuda",
    "kernels.deterministic=true",
    "kernels.compile=off",
    "kernels.cuda_graphs=off",
]


class Slow(Gathers):
    """Weights that leave one of the ranks late."""

    def begin(self) -> None:
        if dist.get_rank() == 1:
            torch.cuda._sleep(50_000_000)
        super().begin()


def trained(overlap: bool) -> tuple[list[Any], dict[str, Any]]:
    cfg = load([*WORDS, "train.accum_steps=2", f"zero.overlap_comm={str(overlap).lower()}", *SIZES])
    with mock.patch.object(flat, "Gathers", partial(Slow, elements=100_000)):
        run = Run(cfg, dist.get_world_size(), one_pass=False, device=torch.device("cuda", torch.cuda.current_device()))
    assert (run.engine._ds.module.model.before is not None) == overlap
    curve: list[Any] = []
    for number in range(6):
        curve += [run.step(number), run.validate()] if number % 2 else [run.step(number)]
    return curve, {name: value.cpu() for name, value in run.weights().items()}


def both() -> list[Any]:
    return [trained(True), trained(False)]


def test_the_bits_are_those_without_overlap() -> None:
    for (curve, weights), (expected, others) in run_ranks(both, 2, backend=backend_of("cuda", 2), timeout_s=200):
        assert curve == expected
        assert all(torch.equal(value, others[name]) for name, value in weights.items())
