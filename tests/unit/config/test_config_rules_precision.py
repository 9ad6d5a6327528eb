"""Rules of fp8: which runs have it, and which sizes; the messages are read."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.derived import block_linears, fp8_linears, in_fp8
from engine.config.enums import Activation, DType, Fp8
from engine.config.load import load
from engine.config.rules import check
from tests.helpers.configs import make

FP8 = {"precision__fp8": Fp8.tensorwise, "precision__dtype": DType.bf16}

# changes, world, code, option=value, words of the rule, words of the way out
CASES: list[tuple[dict[str, Any], int, int, str, str, str]] = [
    (
        {"precision__fp8": Fp8.tensorwise},
        1,
        376,
        "precision.fp8=tensorwise",
        "products in fp8 give bf16, and precision.dtype is fp32",
        "Use precision=fp8, which is bf16 with fp8 linears, or precision.fp8=none",
    ),
    ({**FP8, "precision__dtype": DType.fp16}, 1, 376, "precision.fp8=tensorwise", "precision.dtype is fp16", "none"),
    (
        {**FP8, "model__hidden_size": 54, "model__ffn_size": 100},
        1,
        377,
        "precision.fp8=tensorwise",
        "fp8 takes slices of weights whose sizes are multiples of 16, and with tp(1) no linear of a block has them: "
        "attention.qkv 162 x 54, attention.out 54 x 54, mlp.up 100 x 54, mlp.down 54 x 100",
        "Use model.hidden_size=96, or precision=bf16",
    ),
    (
        {**FP8, "parallel__tp": 2, "model__ffn_size": 68, "model__num_kv_heads": 2},
        2,
        377,
        "precision.fp8=tensorwise",
        "with tp(2) no linear of a block has them: attention.qkv 40 x 48, attention.out 48 x 24, mlp.up 34 x 48",
        "Use a smaller parallel.tp, or precision=bf16",
    ),
    (
        {**FP8, "precision__fp8_bf16_ends": 2},
        1,
        378,
        "precision.fp8_bf16_ends=2",
        "with 2 blocks at either end in bf16 none of model.num_layers 4 is left for fp8",
        "Use precision.fp8_bf16_ends=1, or precision=bf16",
    ),
    (
        {**FP8, "precision__fp8_bf16_ends": -1},
        1,
        301,
        "precision.fp8_bf16_ends=-1",
        "must be at least 0",
        "Use precision.fp8_bf16_ends=0",
    ),
]


@pytest.mark.parametrize(("changes", "world", "code", "named", "rule", "way_out"), CASES)
def test_refusals(changes: dict[str, Any], world: int, code: int, named: str, rule: str, way_out: str) -> None:
    (found,) = check(make(**changes), world)
    assert (found.code, f"{found.option}={found.value}") == (code, named)
    assert rule in found.rule
    assert way_out in found.way_out


@pytest.mark.parametrize("changes", [FP8, {**FP8, "precision__fp8_bf16_ends": 1}, {**FP8, "zero__stage": 3}])
def test_what_can_run(changes: dict[str, Any]) -> None:
    assert check(make(**changes), 1) == []


def test_broken_numbers_are_said_once() -> None:
    assert {found.code for found in check(make(**FP8, model__num_heads=0), 1)} == {301}


def test_the_preset_is_bf16_with_fp8_linears() -> None:
    precision = load(["precision=fp8"]).precision
    assert (precision.dtype, precision.fp8, precision.fp8_bf16_ends) == (DType.bf16, Fp8.tensorwise, 0)
    assert load(["precision=bf16"]).precision.fp8 is Fp8.none


def test_sizes_of_a_rank_s_slices() -> None:
    cfg = make(model__activation=Activation.swiglu, model__num_kv_heads=2, model__ffn_size=128, parallel__tp=2)
    assert block_linears(cfg.model, 2) == {
        "attention.qkv": (40, 48),
        "attention.out": (48, 24),
        "mlp.up": (128, 48),
        "mlp.down": (48, 64),
    }
    assert fp8_linears(cfg) == frozenset()
    cfg.precision.fp8 = Fp8.tensorwise
    assert fp8_linears(cfg) == {"mlp.up", "mlp.down"}


def test_blocks_at_the_ends_can_be_left_out() -> None:
    cfg = make(**FP8, precision__fp8_bf16_ends=1)
    assert [in_fp8(cfg, block) for block in range(4)] == [False, True, True, False]
    assert not in_fp8(make(), 1)
