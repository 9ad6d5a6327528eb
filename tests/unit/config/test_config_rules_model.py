"""Rules of rotary positions and residuals: code, option, value, rule and way out are read."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.config.enums import Family, Positions
from engine.config.rules import check
from tests.helpers.configs import make

ROTARY: dict[str, Any] = {"model__positions": Positions.rotary}
BERT: dict[str, Any] = {"model__family": Family.bert}

# changes, code, option=value, words of the rule, way out
CASES: list[tuple[dict[str, Any], int, str, str, str]] = [
    (
        {**ROTARY, "model__head_dim": 1, "model__rotary_fraction": 0.5},
        304,
        "model.head_dim=1",
        "so head_dim is even",
        "Use model.head_dim=2, or model.positions=learned",
    ),
    (
        {"model__rotary_fraction": 0.5},
        321,
        "model.rotary_fraction=0.5",
        "a learned table of positions has no rotary angles",
        "Use model.rotary_fraction=1.0, or model.positions=rotary",
    ),
    (
        {**BERT, "model__rotary_fraction": 0.5},
        321,
        "model.rotary_fraction=0.5",
        "a learned table of positions has no rotary angles",
        "Use model.rotary_fraction=1.0",
    ),
    (
        {**ROTARY, "model__head_dim": 12, "model__rotary_fraction": 0.44},
        322,
        "model.rotary_fraction=0.44",
        "rotary positions turn pairs of channels, and 5 of head_dim 12 are no pairs",
        "Use model.rotary_fraction=0.3334, or 1.0",
    ),
    (
        {**ROTARY, "model__head_dim": 7, "model__rotary_fraction": 0.1},
        322,
        "model.rotary_fraction=0.1",
        "rotary positions turn pairs of channels, and 0 of head_dim 7 are no pairs",
        "Use model.rotary_fraction=0.2858",
    ),
    (
        {**BERT, "model__parallel_residual": True},
        323,
        "model.parallel_residual=True",
        "the bert family normalises the sum after each sublayer, so that one follows the other",
        "Use model.parallel_residual=false, or model.family=gpt",
    ),
]


@pytest.mark.parametrize(("changes", "code", "head", "rule", "way_out"), CASES, ids=[f"{c[1]}-{c[2]}" for c in CASES])
def test_one_broken_rule(changes: dict[str, Any], code: int, head: str, rule: str, way_out: str) -> None:
    (violation,) = check(make(**changes), 1)
    assert str(violation).startswith(f"[OCT{code}] {head}: ")
    assert rule in violation.rule
    assert violation.way_out == way_out


@pytest.mark.parametrize(
    "changes",
    [
        {**ROTARY, "model__parallel_residual": True, "model__rotary_fraction": 0.25},
        {"model__parallel_residual": True},
        {**ROTARY, "model__head_dim": 7, "model__rotary_fraction": 0.6},
        {"model__bias": False, "model__qkv_bias": True},
        {**BERT, "model__qkv_bias": False},
    ],
    ids=str,
)
def test_just_inside_a_rule_is_legal(changes: dict[str, Any]) -> None:
    assert check(make(**changes), 1) == []


@pytest.mark.parametrize("width", [2, 7, 12, 50, 96, 128])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.26, 0.55, 0.99])
def test_a_share_of_rotary_dims_that_is_offered_is_legal(width: int, share: float) -> None:
    asked = {**ROTARY, "model__head_dim": width}
    for violation in check(make(**asked, model__rotary_fraction=share), 1):
        assert violation.code == 322
        offers = [float(word) for word in re.findall(r"\d\.\d+", violation.way_out)]
        assert offers
        for offer in offers:
            assert check(make(**asked, model__rotary_fraction=offer), 1) == []
