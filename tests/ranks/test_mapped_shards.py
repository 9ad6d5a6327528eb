"""ZeRO-3 whose ranks read each other's parts themselves: the bits of collectives, however late another rank is."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters

from engine.config.enums import Transport
from engine.config.load import load
from engine.config.schema import Config
from engine.runtime import ds_config, ds_engine
from engine.runtime.mapped_shards import MappedShards
from engine.runtime.stage3 import Stage3
from tests.helpers.mapped import SharedFiles
from tests.helpers.ranks import run_ranks
from tests.ranks.test_flat import WORDS, Run

pytestmark = pytest.mark.ranks

STEPS = 4
WHOLE_BLOCKS = ds_config._whole_blocks
WRITE = "_reassign_or_swap_out_partitioned_parameters"


def all_cut(cfg: Config) -> dict[str, Any]:
    """No parameter is so small that every rank keeps it whole, since those are gathered by a collective."""
    return WHOLE_BLOCKS(cfg) | {"stage3_param_persistence_threshold": 0}


def trained(words: list[str], gather: Transport, cut: bool) -> tuple[list[Any], dict[str, Any], list[str]]:
    """Losses and norms of steps and of validations, the weights after them, and what happened in the steps, in order.

    After the steps the state of the second comes back, and training goes on from there.

    The last rank writes each part late, the first reads each part late.
    """
    events: list[str] = []

    def noted(event: str, method: Any, rank: int = -1, late_s: float = 0.0) -> Any:
        def entered(*args: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == rank:
                time.sleep(late_s)
            if events[-1:] != [event]:
                events.append(event)
            return method(*args, **kwargs)

        return entered

    cfg = load([*WORDS, "zero=z3", "train.accum_steps=2", *words])
    cfg.zero.gather = gather
    replaced = [
        # Copy engines are GPUs'.
        (ds_engine, "require_mapped", lambda *_: None),
        (ds_engine, "Mapped", SharedFiles),
        (ds_config, "_whole_blocks", all_cut if cut else WHOLE_BLOCKS),
        (partition_parameters, "_dist_allgather_fn", noted("message", partition_parameters._dist_allgather_fn)),
        (SharedFiles, "meet", noted("meet", SharedFiles.meet)),
        (MappedShards, "_copy", noted("read", MappedShards._copy, 0, 0.002)),
        (Stage3, WRITE, noted("write", getattr(Stage3, WRITE), dist.get_world_size() - 1, 0.05)),
    ]
    with ExitStack() as stack:
        for place, name, instead in replaced:
            stack.enter_context(mock.patch.object(place, name, instead))
        run = Run(cfg, dist.get_world_size(), one_pass=False)
        curve: list[Any] = []
        during: list[str] = []
        for number in range(STEPS):
            events.clear()
            curve.append(run.step(number))
            during += events
            curve.append(run.validate())
            if number == 1:
                state = run.engine.state()
                kept, numbers = [slot.values.clone() for slot in state.slots], dict(state.numbers)
        for slot, values in zip(run.engine.state().slots, kept, strict=True):
            slot.values.copy_(values)
        # Validated in between, so that other ranks have read what is written now.
        curve.append(run.validate())
        run.engine.adopt_state(numbers)
        curve += [run.validate(), *(run.step(number) for number in (2, 3))]
        return curve, run.weights(), during


def both(words: list[str], cut: bool) -> list[Any]:
    return [trained(words, transport, cut) for transport in (Transport.copy_engine, Transport.nccl)]


UNEVEN = ["model.hidden_size=32", "model.num_heads=4", "model.bias=true"]


@pytest.mark.parametrize(
    ("words", "ranks"),
    [(["train.recompute=full"], 2), (["precision=fp32", *UNEVEN], 3)],
    ids=["bf16", "uneven"],
)
def test_the_bits_are_those_of_collectives(words: list[str], ranks: int) -> None:
    for (curve, weights, ours), (expected, others, theirs) in run_ranks(both, ranks, (words, True), timeout_s=200):
        assert curve == expected
        assert curve[0] != curve[2 * STEPS - 2]
        assert curve[2 * STEPS + 1] == curve[3], "the state of the second step"
        assert curve[-1] == curve[2 * STEPS - 2]
        assert all(torch.equal(value, others[name]) for name, value in weights.items())
        # All have read before any writes. All have written before any reads, which validations between the steps do.
        assert ours == ["meet"] + ["read", "meet", "write"] * STEPS
        assert theirs == ["message", "write"] * STEPS


def test_small_parameters_that_every_rank_keeps_whole() -> None:
    for (curve, weights, ours), (expected, others, _) in run_ranks(both, 2, ([], False), timeout_s=200):
        assert curve == expected
        assert all(torch.equal(value, others[name]) for name, value in weights.items())
        assert "read" in ours
