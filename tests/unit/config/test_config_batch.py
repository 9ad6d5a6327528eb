"""Micro-batch, accumulation and global batch: what follows, which sizes `auto` chooses from, what is refused."""

from __future__ import annotations

import pytest

from engine.config import rules
from engine.config.batch import AUTO, candidates, is_auto, settle
from engine.config.enums import PipelineSchedule
from engine.config.load import load, resolved_yaml
from engine.config.schema import Config
from engine.errors import ConfigError
from tests.helpers.configs import make


def found(cfg: Config, world: int) -> str:
    [violation] = rules.check(cfg, world)
    return str(violation)


def test_accumulation_follows_from_the_global_batch() -> None:
    cfg = make(train__micro_batch=4, train__global_batch=64)
    rules.require(cfg, 2)
    assert cfg.train.accum_steps == 8
    rules.require(cfg, 2)
    assert cfg.train.accum_steps == 8, "a settled config stays as it is"


def test_ranks_that_share_samples_are_no_replicas() -> None:
    cfg = make(train__micro_batch=2, train__global_batch=16, parallel__tp=2)
    settle(cfg, 4)
    assert cfg.train.accum_steps == 4


def test_a_global_batch_that_the_replicas_cannot_share_is_refused_with_the_nearest() -> None:
    assert found(make(train__micro_batch=4, train__global_batch=60), 2) == (
        "[OCT392] train.global_batch=60: not a multiple of micro 4 x dp 2 = 8 samples, of which accumulation makes up "
        "a step. Use train.global_batch=56 or 64, or train.micro_batch=3"
    )
    assert "Use train.global_batch=8" in found(make(train__micro_batch=4, train__global_batch=3), 2)


def test_accumulation_that_contradicts_the_global_batch_is_refused() -> None:
    assert found(make(train__micro_batch=4, train__global_batch=64, train__accum_steps=4), 2) == (
        "[OCT393] train.accum_steps=4: train.global_batch 64 = micro 4 x accum 8 x dp 2 samples. "
        "Use train.accum_steps=8, or train.global_batch=null"
    )


def test_schedules_are_held_to_the_accumulation_that_follows() -> None:
    cfg = make(
        train__micro_batch=4, train__global_batch=8, parallel__pp=2, parallel__schedule=PipelineSchedule.dualpipev
    )
    with pytest.raises(ConfigError, match=r"OCT228\] train.accum_steps=2: .*at least 2 \* pp\(2\) = 4"):
        rules.require(cfg, 2)


def test_auto_is_a_word_until_it_is_found_and_commands_that_need_a_number_say_so() -> None:
    cfg = load(["train.micro_batch=auto"])
    assert is_auto(cfg)
    assert "micro_batch: auto" in resolved_yaml(cfg)
    assert found(cfg, 1) == (
        "[OCT390] train.micro_batch=auto: it is found by trial before python -m engine.train starts its own ranks, and "
        "here a number is needed. Use the number that python -m engine.tune micro_batch finds with the same options"
        "; python -m engine.plan expects one where a preset states the device, as hardware=h200 does"
    )


def test_another_word_and_a_fraction_are_refused() -> None:
    for word, said in (("most", "most"), ("2.5", "2.5"), ("true", "True"), ("null", "None"), ("'4'", "4")):
        assert found(load([f"train.micro_batch={word}"]), 1) == (
            f"[OCT391] train.micro_batch={said}: expected an integer or auto. "
            "Use train.micro_batch=1, or train.micro_batch=auto"
        )
    assert "[OCT301] train.micro_batch=0: must be at least 1" in found(make(train__micro_batch=0), 1)


def test_without_a_global_batch_sizes_grow_by_at_most_a_half() -> None:
    sizes = candidates(make(train__micro_batch=AUTO), 1, 100)
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]
    assert [candidates(make(), 1, limit) for limit in (1, 2, 3)] == [[1], [1, 2], [1, 2, 3]]


def test_with_a_global_batch_sizes_divide_a_replica_s_share() -> None:
    cfg = make(train__micro_batch=AUTO, train__global_batch=48)
    assert candidates(cfg, 2, 100) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert candidates(cfg, 2, 10) == [1, 2, 3, 4, 6, 8]
    assert candidates(cfg, 5, 100) == []
    cfg.train.accum_steps = 4
    assert candidates(cfg, 2, 100) == [6]


def test_sizes_leave_as_many_micro_batches_as_the_schedule_needs() -> None:
    cfg = make(train__global_batch=16, parallel__pp=2, parallel__schedule=PipelineSchedule.dualpipev)
    assert candidates(cfg, 2, 100) == [1, 2, 4]
