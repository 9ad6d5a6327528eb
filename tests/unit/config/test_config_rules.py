"""Every rule between options: code, option, value, rule and way out are read."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.config.bounds import RANGES
from engine.config.enums import DType, Positions, Switch
from engine.config.options import options
from engine.config.rules import check, require
from engine.errors import ConfigError
from tests.helpers.configs import make


def test_a_sound_config_breaks_no_rule() -> None:
    assert check(make(), 1) == []
    require(make(parallel__pp=2, parallel__tp=2, parallel__dp=2), 8)


def test_a_run_without_steps_is_told_so_and_nothing_of_its_warm_up() -> None:
    assert [violation.code for violation in check(make(train__steps=-1), 1)] == [301]


# changes, world size, code, option=value, words of the rule, words of the way out
CASES: list[tuple[dict[str, Any], int, int, str, str, str]] = [
    ({"parallel__pp": 0}, 1, 201, "parallel.pp=0", "a degree is at least 1", "Use parallel.pp=1"),
    ({"parallel__dp": -1}, 1, 201, "parallel.dp=-1", "a degree is at least 1", "Use parallel.dp=1"),
    (
        {"parallel__pp": 2, "parallel__tp": 6},
        16,
        202,
        "parallel.pp*parallel.tp=12",
        "pp(2) * tp(6) = 12 does not divide world_size 16",
        "Nearest legal: 'parallel.pp=2 parallel.tp=2', 'parallel.pp=4 parallel.tp=2', 'parallel.pp=1 parallel.tp=2', "
        "or start 12 ranks",
    ),
    (
        {"parallel__pp": 2, "parallel__dp": 4},
        4,
        203,
        "parallel.dp=4",
        "dp=4 asked, but the launcher gave world_size 4 = pp(2) * tp(1) * dp(2)",
        "Use parallel.dp=2, or start 8 ranks",
    ),
    (
        {"parallel__pp": 2, "parallel__dp": 1},
        3,
        203,
        "parallel.dp=1",
        "world_size 3 is not a multiple of pp(2) * tp(1) = 2",
        "'parallel.pp=3 parallel.tp=1'",
    ),
    ({"parallel__tp": 4}, 4, 204, "parallel.tp=4", "tp(4) does not divide model.num_heads 6", "legal tp: 1, 2, 3, 6"),
    (
        {"parallel__tp": 6, "model__num_kv_heads": 2},
        6,
        205,
        "parallel.tp=6",
        "does not divide model.num_kv_heads 2",
        "legal tp: 1, 2",
    ),
    (
        {"parallel__tp": 6, "model__ffn_size": 128},
        6,
        206,
        "parallel.tp=6",
        "does not divide model.ffn_size 128",
        "legal tp: 1, 2",
    ),
    (
        {"parallel__pp": 8},
        8,
        207,
        "parallel.pp=8",
        "pp(8) stages are more than the 4 blocks of the model",
        "Nearest legal: 'parallel.pp=4 parallel.tp=1'",
    ),
    ({"zero__stage": 4}, 1, 301, "zero.stage=4", "must be at least 0 and at most 3", "Use zero.stage=3"),
    ({"zero__stage": -1}, 1, 301, "zero.stage=-1", "must be at least 0 and at most 3", "Use zero.stage=0"),
    ({"model__num_layers": 0}, 1, 301, "model.num_layers=0", "must be at least 1", "Use model.num_layers=1"),
    ({"model__dropout": 1.0}, 1, 301, "model.dropout=1.0", "at least 0 and less than 1", "default model.dropout=0.0"),
    ({"optim__lr": 0.0}, 1, 301, "optim.lr=0.0", "must be greater than 0", "Use a number greater than 0"),
    ({"optim__lr": math.nan}, 1, 301, "optim.lr=nan", "must be greater than 0", "Use a number greater than 0"),
    ({"optim__lr": math.inf}, 1, 301, "optim.lr=inf", "must be greater than 0", "Use a number greater than 0"),
    ({"optim__eps": 0.0}, 1, 301, "optim.eps=0.0", "must be greater than 0", "default optim.eps=1e-08"),
    ({"optim__beta2": 1.0}, 1, 301, "optim.beta2=1.0", "at least 0 and less than 1", "default optim.beta2=0.95"),
    ({"optim__beta1": -0.1}, 1, 301, "optim.beta1=-0.1", "at least 0 and less than 1", "Use optim.beta1=0"),
    ({"optim__min_lr_ratio": 2.0}, 1, 301, "optim.min_lr_ratio=2.0", "at most 1", "Use optim.min_lr_ratio=1"),
    ({"optim__clip_norm": -1.0}, 1, 301, "optim.clip_norm=-1.0", "must be at least 0", "Use optim.clip_norm=0"),
    (
        {"model__num_kv_heads": 4},
        1,
        302,
        "model.num_kv_heads=4",
        "4 key/value heads do not divide num_heads 6",
        "Legal model.num_kv_heads: 1, 2, 3, 6",
    ),
    (
        {"model__num_heads": 5},
        1,
        303,
        "model.hidden_size=48",
        "not a multiple of num_heads 5, and head_dim is not set",
        "Use model.hidden_size=50, model.num_heads=4 or 6, or set model.head_dim",
    ),
    (
        {"model__head_dim": 7, "model__positions": Positions.rotary},
        1,
        304,
        "model.head_dim=7",
        "so head_dim is even",
        "Use model.head_dim=8, or model.positions=learned",
    ),
    (
        {"data__seq_len": 65},
        1,
        305,
        "data.seq_len=65",
        "more than model.max_positions 64",
        "Use data.seq_len=64, or model.max_positions=65",
    ),
    (
        {"data__vocab_size": 513},
        1,
        306,
        "data.vocab_size=513",
        "more than model.vocab_size 512",
        "Use data.vocab_size=512, or model.vocab_size=513",
    ),
    (
        {"data__valid_fraction": 0.0},
        1,
        307,
        "train.eval_batches=8",
        "nothing is held out",
        "Use train.eval_batches=0, or data.valid_fraction=0.05",
    ),
    (
        {"optim__warmup_steps": 11},
        1,
        308,
        "optim.warmup_steps=11",
        "longer than the 10 steps",
        "Use optim.warmup_steps=1, or train.steps=11",
    ),
    (
        {"optim__decay_steps": 2},
        1,
        309,
        "optim.decay_steps=2",
        "before the warm-up does, at step 2",
        "Use optim.decay_steps=10, or optim.decay_steps=null",
    ),
    (
        {"run__name": "a/../b c"},
        1,
        310,
        "run.name=a/../b c",
        "letters, digits, '.', '_' and '-'",
        "Use run.name=a-..-b-c",
    ),
    ({"run__name": ".."}, 1, 310, "run.name=..", "names one folder", "Use run.name=run"),
    (
        {"profile__start": 9, "profile__steps": 3},
        1,
        311,
        "profile.start=9",
        "profiled steps 9 to 11 reach past train.steps 10",
        "Use profile.start=7 profile.steps=3, or train.steps=12",
    ),
    (
        {"zero__stage": 0, "precision__dtype": DType.bf16},
        1,
        314,
        "zero.stage=0",
        "for a bf16 model only DeepSpeed's ZeRO optimizers add up gradients in fp32",
        "Use zero.stage=1, which with dp=1 shards nothing",
    ),
]


@pytest.mark.parametrize(
    ("changes", "world", "code", "head", "rule", "way_out"), CASES, ids=[f"{c[2]}-{c[3]}" for c in CASES]
)
def test_one_broken_rule(changes: dict[str, Any], world: int, code: int, head: str, rule: str, way_out: str) -> None:
    (violation,) = check(make(**changes), world)
    assert str(violation).startswith(f"[OCT{code}] {head}: ")
    assert rule in violation.rule
    assert way_out in violation.way_out


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__warmup_steps": 10},
        {"optim__decay_steps": 3},
        {"data__seq_len": 64},
        {"data__valid_fraction": 0.0, "data__source": "random"},
        {"data__valid_fraction": 0.0, "train__eval_batches": 0},
        {"profile__start": 7, "profile__steps": 3},
        {"profile__start": 99},
        {"zero__stage": 3},
        {"zero__stage": 1, "precision__dtype": DType.bf16},
        {"zero__stage": 1, "precision__dtype": DType.fp16, "precision__loss_scale": 128.0},
        {"zero__stage": 3, "kernels__compile": Switch.on},
        {"optim__clip_norm": 0.0, "optim__min_lr_ratio": 1.0},
        {"model__num_heads": 5, "model__head_dim": 8},
        {"model__head_dim": 7},
        {"run__name": "gpt2-124m_v1.0"},
    ],
    ids=str,
)
def test_just_inside_a_rule_is_legal(changes: dict[str, Any]) -> None:
    assert check(make(**changes), 1) == []


@pytest.mark.parametrize("path", [path for paths in RANGES.values() for path in paths])
def test_every_bounded_number_refuses_minus_one(path: str) -> None:
    found = [v for v in check(make(**{path.replace(".", "__"): -1}), 1) if v.code == 301]
    assert [violation.option for violation in found] == [path]


def test_every_number_of_the_schema_has_a_range() -> None:
    bounded = {path for paths in RANGES.values() for path in paths} | {"parallel.pp", "parallel.tp", "parallel.dp"}
    bounded |= {"parallel.context"}
    numbers = {path for path, option in options().items() if option.words.startswith(("an integer", "a number"))}
    assert numbers == bounded


def test_layouts_offered_are_legal_for_the_model_too() -> None:
    # tp=4 divides 20 ranks but not 6 heads, pp=5 divides them but not into 4 blocks.
    (violation,) = check(make(parallel__pp=3, parallel__tp=3), 20)
    assert "tp=4" not in violation.way_out
    assert "pp=5" not in violation.way_out
    assert "Nearest legal: 'parallel.pp=2 parallel.tp=2', 'parallel.pp=4 parallel.tp=1'" in violation.way_out


def test_all_violations_come_at_once() -> None:
    cfg = make(
        parallel__pp=8,
        parallel__tp=4,
        zero__stage=3,
        optim__lr=-1.0,
        data__seq_len=65,
        run__name="",
        model__num_heads=9,
    )
    with pytest.raises(ConfigError) as caught:
        require(cfg, 33)
    codes = [violation.code for violation in caught.value.violations]
    assert codes == [202, 204, 207, 208, 301, 303, 305, 310]
    assert str(caught.value).splitlines()[7].startswith("8. [OCT310]")


def test_illegal_sizes_do_not_hide_other_violations_or_divide_by_zero() -> None:
    cfg = make(model__num_heads=0, model__num_kv_heads=0, parallel__tp=0, train__steps=0, zero__stage=9)
    options_found = {violation.option for violation in check(cfg, 4)}
    assert {"model.num_heads", "model.num_kv_heads", "parallel.tp", "train.steps", "zero.stage"} <= options_found
