"""Rules of layouts and schedules: the messages are read, and every layout they offer is tried."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from engine.config import rules_memory, rules_parallel
from engine.config.enums import Device, PipelineSchedule, TpOverlap, Transport
from engine.config.rules import check
from engine.config.rules_parallel import fits
from engine.config.schema import Config
from tests.helpers.configs import make

INTERLEAVED, DUALPIPEV = PipelineSchedule.interleaved, PipelineSchedule.dualpipev

# changes, world size, code, option=value, words of the rule, words of the way out
CASES: list[tuple[dict[str, Any], int, int, str, str, str]] = [
    ({"parallel__context": 0}, 1, 201, "parallel.context=0", "a degree is at least 1", "Use parallel.context=1"),
    (
        {"parallel__pp": 2, "parallel__context": 2},
        6,
        202,
        "parallel.pp*parallel.context*parallel.tp=4",
        "pp(2) * context(2) * tp(1) = 4 does not divide world_size 6",
        "Nearest legal: 'parallel.pp=3 parallel.context=2 parallel.tp=1', "
        "'parallel.pp=1 parallel.context=2 parallel.tp=1', 'parallel.pp=2 parallel.context=1 parallel.tp=1', "
        "or start 8 ranks",
    ),
    (
        {"parallel__context": 2, "parallel__dp": 4},
        4,
        203,
        "parallel.dp=4",
        "the launcher gave world_size 4 = pp(1) * context(2) * tp(1) * dp(2)",
        "Use parallel.dp=2, or start 8 ranks",
    ),
    (
        {"parallel__tp_overlap": TpOverlap.symmetric, "train__device": Device.cpu},
        1,
        230,
        "parallel.tp_overlap=symmetric",
        "copy engines are GPUs', and train.device is cpu",
        "Use parallel.tp_overlap=auto",
    ),
    (
        {"parallel__pipeline_transport": Transport.copy_engine, "train__device": Device.cpu},
        1,
        231,
        "parallel.pipeline_transport=copy_engine",
        "copy engines are GPUs', and train.device is cpu",
        "Use parallel.pipeline_transport=auto",
    ),
    (
        {"zero__stage": 3, "parallel__pp": 2},
        4,
        208,
        "zero.stage=3",
        "with pp(2) the passes of several micro-batches interleave",
        "at most stage 2. Use zero.stage=2, or 'parallel.pp=1 parallel.tp=2'",
    ),
    (
        {"zero__stage": 3, "parallel__pp": 2, "parallel__context": 2},
        4,
        208,
        "zero.stage=3",
        "at most stage 2",
        "or 'parallel.pp=1 parallel.context=2 parallel.tp=1'",
    ),
    (
        {"parallel__context": 2, "data__seq_len": 33},
        2,
        229,
        "data.seq_len=33",
        "not a multiple of context(2) = 2: every rank holds the same number of positions",
        "Use data.seq_len=32 or 34, or the nearest legal: 'parallel.pp=1 parallel.context=1 parallel.tp=1', ",
    ),
    (
        {"parallel__context": 3, "parallel__tp": 2, "parallel__sequence": True, "data__seq_len": 63},
        6,
        229,
        "data.seq_len=63",
        "not a multiple of context(3) * tp(2) = 6",
        "Use data.seq_len=60, or the nearest legal: ",
    ),
    (
        {"parallel__context": 6, "parallel__tp": 2, "data__seq_len": 36},
        12,
        221,
        "parallel.context=6",
        "context(6) * tp(2) = 12 does not divide model.num_heads 6",
        "Nearest legal: 'parallel.pp=1 parallel.context=3 parallel.tp=2', "
        "'parallel.pp=1 parallel.context=6 parallel.tp=1', 'parallel.pp=2 parallel.context=3 parallel.tp=2'",
    ),
    (
        {"parallel__context": 2, "model__num_kv_heads": 3},
        2,
        222,
        "parallel.context=2",
        "of context(2) and the 3 key/value heads of a tp rank neither divides the other",
        "Nearest legal: 'parallel.pp=1 parallel.context=1 parallel.tp=1', ",
    ),
    (
        {"parallel__schedule": INTERLEAVED, "parallel__virtual_stages": 2},
        2,
        223,
        "parallel.schedule=interleaved",
        "a schedule of several stages, but pp is 1",
        "Use parallel.schedule=one_f_one_b, or the nearest legal: none",
    ),
    (
        {"parallel__schedule": DUALPIPEV, "train__accum_steps": 8},
        4,
        223,
        "parallel.schedule=dualpipev",
        "a schedule of several stages, but pp is 1",
        "or the nearest legal: 'parallel.pp=2 parallel.tp=1', 'parallel.pp=2 parallel.tp=2'",
    ),
    (
        {"parallel__pp": 2, "parallel__schedule": INTERLEAVED, "train__accum_steps": 2},
        2,
        224,
        "parallel.virtual_stages=1",
        "each rank holds at least 2 parts of the model",
        "Use parallel.virtual_stages=2, or parallel.schedule=one_f_one_b",
    ),
    (
        {
            "parallel__pp": 2,
            "parallel__schedule": INTERLEAVED,
            "parallel__virtual_stages": 3,
            "train__accum_steps": 2,
        },
        2,
        225,
        "parallel.virtual_stages=3",
        "pp(2) * 3 parts = 6 are more than the 4 blocks of the model",
        "Use parallel.virtual_stages=2, or the nearest legal: none",
    ),
    (
        {"parallel__pp": 4, "parallel__schedule": DUALPIPEV, "train__accum_steps": 8},
        4,
        225,
        "parallel.schedule=dualpipev",
        "pp(4) * 2 parts = 8 are more than the 4 blocks of the model",
        "Use parallel.schedule=one_f_one_b, or the nearest legal: 'parallel.pp=2 parallel.tp=1'",
    ),
    (
        {
            "parallel__pp": 2,
            "parallel__schedule": INTERLEAVED,
            "parallel__virtual_stages": 2,
            "train__accum_steps": 3,
        },
        2,
        226,
        "train.accum_steps=3",
        "interleaved stages take micro-batches in groups of pp(2)",
        "Use train.accum_steps=2 or 4, or parallel.schedule=one_f_one_b",
    ),
    (
        {"parallel__pp": 2, "parallel__virtual_stages": 2},
        2,
        227,
        "parallel.virtual_stages=2",
        "only the interleaved schedule has a number of parts to choose",
        "Use parallel.virtual_stages=1, or parallel.schedule=interleaved",
    ),
    (
        {"parallel__pp": 2, "parallel__schedule": DUALPIPEV, "train__accum_steps": 3},
        2,
        228,
        "train.accum_steps=3",
        "dualpipev sends micro-batches from both ends: at least 2 * pp(2) = 4",
        "Use train.accum_steps=4, or parallel.schedule=one_f_one_b",
    ),
]


@pytest.mark.parametrize(
    ("changes", "world", "code", "head", "rule", "way_out"), CASES, ids=[f"{c[2]}-{c[3]}" for c in CASES]
)
def test_one_broken_rule(changes: dict[str, Any], world: int, code: int, head: str, rule: str, way_out: str) -> None:
    (violation,) = check(make(**changes), world)
    assert str(violation).startswith(f"[OCT{code}] {head}: ")
    assert rule in violation.rule
    assert way_out in str(violation)


@pytest.mark.parametrize(
    ("changes", "world"),
    [
        ({"zero__stage": 2, "parallel__pp": 2}, 2),
        ({"zero__stage": 3, "parallel__context": 2, "parallel__tp": 3}, 6),
        ({"parallel__sequence": True, "data__seq_len": 33}, 1),
        ({"parallel__sequence": True, "parallel__tp": 2, "parallel__context": 3, "data__seq_len": 36}, 12),
        ({"parallel__context": 2, "model__num_kv_heads": 1}, 2),
        ({"parallel__context": 3, "parallel__tp": 2, "data__seq_len": 36}, 6),
        (
            {
                "parallel__pp": 2,
                "parallel__schedule": INTERLEAVED,
                "parallel__virtual_stages": 2,
                "train__accum_steps": 4,
            },
            4,
        ),
        ({"parallel__pp": 2, "parallel__schedule": DUALPIPEV, "train__accum_steps": 4}, 2),
    ],
    ids=str,
)
def test_just_inside_a_rule_is_legal(changes: dict[str, Any], world: int) -> None:
    assert check(make(**changes), world) == []


FLAVOURS: list[dict[str, Any]] = [
    {},
    {"model__num_kv_heads": 2},
    {"parallel__sequence": True, "data__seq_len": 12},
    {"zero__stage": 3},
    {"parallel__schedule": INTERLEAVED, "parallel__virtual_stages": 2, "train__accum_steps": 6},
    {"parallel__schedule": DUALPIPEV, "train__accum_steps": 5, "model__num_layers": 12},
]


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
def test_a_layout_fits_exactly_when_no_rule_is_broken(flavour: dict[str, Any]) -> None:
    world = 24
    for pp, cp, tp in product((1, 2, 3, 4, 6), (1, 2, 3, 4), (1, 2, 3)):
        if world % (pp * cp * tp) == 0:
            cfg = make(**flavour, parallel__pp=pp, parallel__context=cp, parallel__tp=tp)
            assert fits(cfg)(pp, cp, tp) == (check(cfg, world) == []), (pp, cp, tp)


def _offered(text: str) -> list[dict[str, int]]:
    return [
        {key: int(value) for key, value in re.findall(r"parallel\.(pp|context|tp)=(\d+)", words)}
        for words in re.findall(r"'(parallel\.pp=[^']*)'", text)
    ]


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
@pytest.mark.parametrize("asked", [(5, 1, 1), (8, 2, 1), (1, 4, 3), (2, 1, 5), (3, 3, 3), (12, 1, 2)], ids=str)
def test_every_layout_that_a_message_offers_can_run(flavour: dict[str, Any], asked: tuple[int, int, int]) -> None:
    world = 24
    cfg = make(**flavour, parallel__pp=asked[0], parallel__context=asked[1], parallel__tp=asked[2])
    found = check(cfg, world)
    assert found
    offers = [layout for violation in found for layout in _offered(violation.way_out)]
    for layout in offers:
        assert check(_with(cfg, layout), world) == [], layout
    assert offers or all(violation.code in (204, 206) for violation in found)


def _with(cfg: Config, layout: dict[str, int]) -> Config:
    return replace(cfg, parallel=replace(cfg.parallel, **layout))


def test_too_many_stages_are_told_once() -> None:
    changes = {"parallel__schedule": INTERLEAVED, "parallel__virtual_stages": 2, "train__accum_steps": 8}
    assert [violation.code for violation in check(make(**changes, parallel__pp=8), 8)] == [207]


def test_one_line_narrows_the_zero_stages_of_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rules_parallel, rules_memory):
        monkeypatch.setattr(module, "PIPELINE_ZERO", 1)
    (violation,) = check(make(zero__stage=2, parallel__pp=2), 2)
    assert "what stage 2 would shard" in violation.rule
    assert "Use zero.stage=1" in violation.way_out
