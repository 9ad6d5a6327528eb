"""Rules for state that is saved and gone on from: option, value, rule and way out are read."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.enums import Offload, OffloadStrategy
from engine.config.rules import check
from engine.config.rules_run import state_violations
from tests.helpers.configs import make

NVME: dict[str, Any] = {"zero__stage": 3, "zero__offload_optimizer": Offload.nvme, "zero__nvme_path": "disk"}
OUT_OF_REACH = "keeps optimizer state where checkpoints cannot reach it"
PLAIN = "Use plain offload to host memory (=cpu, zero.offload_strategy=plain)"

# changes, code, option=value, rule, way out
CASES: list[tuple[dict[str, Any], int, str, str, str]] = [
    (
        {"run__resume": True, "run__overwrite": True},
        380,
        "run.resume=True",
        "run.overwrite=true removes what it would go on from",
        "Use one of them",
    ),
    (
        {"checkpoint__load": "runs/a", "checkpoint__initial_weights": "runs/b"},
        381,
        "checkpoint.load=runs/a",
        "checkpoint.initial_weights is set too, and a state has weights of its own",
        "Use checkpoint.load=null to start from the weights, or checkpoint.initial_weights=null to go on",
    ),
    *(
        (
            {"run__overwrite": True, "run__dir": "runs", "run__name": "a", f"checkpoint__{name}": value},
            384,
            f"checkpoint.{name}={value}",
            "run.overwrite=true removes it: it lies in runs/a",
            "Use another run.name, such as run.name=a-2, without run.overwrite",
        )
        for name, value in (("load", "runs/a"), ("initial_weights", "runs/a/weights"), ("load", "./runs/a/checkpoints"))
    ),
    ({**NVME, "run__resume": True}, 382, "run.resume=True", f"zero.offload_optimizer=nvme {OUT_OF_REACH}", PLAIN),
    (
        {**NVME, "zero__offload_params": Offload.nvme, "checkpoint__load": "runs/a"},
        382,
        "checkpoint.load=runs/a",
        f"zero.offload_optimizer=nvme {OUT_OF_REACH}",
        PLAIN,
    ),
    (
        {**NVME, "checkpoint__every": 10},
        382,
        "checkpoint.every=10",
        f"zero.offload_optimizer=nvme {OUT_OF_REACH}",
        f"Use checkpoint.every=0, or {PLAIN.removeprefix('Use ')}",
    ),
]


@pytest.mark.parametrize(("changes", "code", "head", "rule", "way_out"), CASES, ids=[f"{c[1]}-{c[2]}" for c in CASES])
def test_one_broken_rule(changes: dict[str, Any], code: int, head: str, rule: str, way_out: str) -> None:
    (violation,) = check(make(**changes), 1)
    assert str(violation).startswith(f"[OCT{code}] {head}: ")
    assert (violation.rule, violation.way_out) == (rule, way_out)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"zero__offload_params": Offload.nvme}, "zero.offload_params=nvme"),
        ({"zero__offload_strategy": OffloadStrategy.zenflow}, "zero.offload_strategy=zenflow"),
        ({"zero__offload_strategy": OffloadStrategy.superoffload}, "zero.offload_strategy=superoffload"),
    ],
)
def test_every_place_out_of_reach_is_named(changes: dict[str, Any], named: str) -> None:
    (violation,) = state_violations(make(**changes, run__resume=True))
    assert (violation.code, violation.rule) == (382, f"{named} {OUT_OF_REACH}")


def test_all_violations_come_at_once() -> None:
    state = {"checkpoint__load": "a", "checkpoint__initial_weights": "b", "checkpoint__every": 1}
    found = state_violations(make(**NVME, **state, run__resume=True, run__overwrite=True))
    assert [violation.code for violation in found] == [380, 381, 382, 382, 382]
    assert [violation.option for violation in found[2:]] == ["run.resume", "checkpoint.load", "checkpoint.every"]


@pytest.mark.parametrize(
    "changes",
    [
        {"run__resume": True, "checkpoint__load": "runs/a"},
        {"run__resume": True, "checkpoint__initial_weights": "runs/a"},
        # No checkpoint comes in ten steps.
        {**NVME, "checkpoint__every": 11},
        {**NVME, "checkpoint__every": 0},
        {"zero__stage": 3, "zero__offload_optimizer": Offload.cpu, "run__resume": True, "checkpoint__every": 5},
    ],
    ids=str,
)
def test_just_inside_a_rule_is_legal(changes: dict[str, Any]) -> None:
    assert check(make(**changes), 1) == []
