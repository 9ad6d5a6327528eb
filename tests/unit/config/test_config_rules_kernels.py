"""Rules for passes that are recorded as CUDA graphs; the messages are read."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.enums import DType, Offload, Switch, Tiles
from engine.config.rules import check
from tests.helpers.configs import make

GRAPHS = {"kernels__cuda_graphs": Switch.on, "precision__dtype": DType.bf16, "zero__stage": 1}

# changes, world, code, rule, way out
CASES: list[tuple[dict[str, Any], int, int, str, str]] = [
    (
        {"precision__dtype": DType.fp32, "zero__stage": 0},
        1,
        385,
        "passes are recorded where gradients are added up in flat sums: in bf16 at ZeRO-1 with its state on the "
        "device, and here is precision.dtype=fp32, zero.stage=0",
        "Use 'precision=bf16 zero=z1', or kernels.cuda_graphs=off",
    ),
    (
        {"zero__stage": 2},
        1,
        385,
        "with its state on the device, and here is zero.stage=2",
        "Use 'precision=bf16 zero=z1'",
    ),
    (
        {"zero__offload_optimizer": Offload.cpu},
        1,
        385,
        "and here is zero.offload_optimizer=cpu",
        "Use 'precision=bf16 zero=z1', or kernels.cuda_graphs=off",
    ),
    (
        {"parallel__pp": 2, "parallel__tp": 2},
        4,
        386,
        "a recorded pass has no messages between ranks, and here is parallel.pp=2, parallel.tp=2",
        "Use parallel.pp=1 parallel.tp=1, or kernels.cuda_graphs=off",
    ),
    (
        {"parallel__context": 2},
        2,
        386,
        "a recorded pass has no messages between ranks, and here is parallel.context=2",
        "Use parallel.context=1, or kernels.cuda_graphs=off",
    ),
    (
        {},
        2,
        387,
        "a recorded pass has no messages between ranks, so that gradients are reduced after it, and here is "
        "zero.overlap_comm=true with dp(2)",
        "Use zero.overlap_comm=false, or kernels.cuda_graphs=off",
    ),
    (
        {"train__tiles": Tiles.mlp},
        1,
        388,
        "a recorded pass is one forward and one backward pass, on one stream and in the device's memory, and here is "
        "train.tiles=mlp",
        "Use train.tiles=none train.recompute_offload=false, or kernels.cuda_graphs=off",
    ),
    (
        {"model__attention_dropout": 0.1, "data__document_mask": True, "data__variable_length": True},
        1,
        389,
        "seeds, lengths and sizes that the host gives to kernels stay those of the pass that was recorded, and here is "
        "model.attention_dropout=0.1, data.document_mask=true, data.variable_length=true",
        "Use model.attention_dropout=0 data.document_mask=false data.variable_length=false, or kernels.cuda_graphs=off",
    ),
]


@pytest.mark.parametrize(("changes", "world", "code", "rule", "way_out"), CASES)
def test_refusals(changes: dict[str, Any], world: int, code: int, rule: str, way_out: str) -> None:
    (found,) = check(make(**GRAPHS | changes), world)
    assert str(found).startswith(f"[OCT{code}] kernels.cuda_graphs=on: ")
    assert rule in found.rule
    assert way_out in found.way_out


def test_inputs_that_leave_the_device_are_refused_too() -> None:
    found = check(make(**GRAPHS, train__recompute_offload=True), 1)
    (mine,) = [violation for violation in found if violation.code == 388]
    assert mine.rule.endswith("and here is train.recompute_offload=true")


@pytest.mark.parametrize("switch", [Switch.auto, Switch.off])
def test_only_who_asks_by_name_is_refused(switch: Switch) -> None:
    changes = [changes for changes, world, *_ in CASES if world == 1]
    for change in changes:
        found = check(make(**GRAPHS | change | {"kernels__cuda_graphs": switch}), 1)
        assert [violation.code for violation in found if 385 <= violation.code <= 389] == []


@pytest.mark.parametrize(
    ("changes", "world"), [({}, 1), ({"zero__overlap_comm": False}, 2), ({"model__dropout": 0.1}, 1)]
)
def test_what_can_run(changes: dict[str, Any], world: int) -> None:
    assert check(make(**GRAPHS | changes), world) == []
