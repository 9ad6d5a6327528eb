"""ZeRO-3 over memory that two ranks map of each other: the bits of a gather, however late a rank writes or reads."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from engine.config.load import load
from engine.runtime.mapped_shards import MappedShards
from engine.runtime.stage3 import Stage3
from tests.helpers.ranks import backend_of, run_ranks
from tests.ranks.test_flat import WORDS, Run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WRITE = "_reassign_or_swap_out_partitioned_parameters"
# Large enough that matrices are cut.
LARGE = ["model.hidden_size=512", "train.device=cuda", "kernels.deterministic=true", "kernels.compile=off"]


def after_a_while(method: Any, rank: int, cycles: int) -> Any:
    """`method`, before which the stream of one rank does nothing for so many clock cycles."""

    def entered(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == rank:
            torch.cuda._sleep(cycles)
        return method(*args, **kwargs)

    return entered


def trained(gather: str) -> tuple[list[Any], dict[str, Any]]:
    cfg = load([*WORDS, "zero=z3", "train.accum_steps=2", f"zero.gather={gather}", *LARGE])
    with ExitStack() as stack:
        for place, name, rank, cycles in ((Stage3, WRITE, 1, 50_000_000), (MappedShards, "_copy", 0, 200_000)):
            late = after_a_while(getattr(place, name), rank, cycles)
            stack.enter_context(mock.patch.object(place, name, late))
        device = torch.device("cuda", torch.cuda.current_device())
        run = Run(cfg, dist.get_world_size(), one_pass=False, device=device)
        curve: list[Any] = []
        for number in range(6):
            curve += [run.step(number), run.validate()]
        return curve, {name: value.cpu() for name, value in run.weights().items()}


def both() -> list[Any]:
    return [trained("copy_engine"), trained("nccl")]


def test_the_bits_are_those_of_nccl() -> None:
    for (curve, weights), (expected, others) in run_ranks(both, 2, backend=backend_of("cuda", 2), timeout_s=200):
        assert curve == expected
        assert all(torch.equal(value, others[name]) for name, value in weights.items())
