from __future__ import annotations

from typing import Any

import pytest

from engine.config import Config
from engine.config.deepspeed_keys import KNOWN, OWNED
from engine.config.load import load
from engine.config.options import options
from engine.config.rules import check
from engine.errors import Violation


@pytest.fixture(scope="module")
def cfg() -> Config:
    return load([])


def found(cfg: Config, extra: dict[str, Any]) -> list[Violation]:
    cfg.runtime.deepspeed_extra = extra
    return check(cfg, 1)


@pytest.mark.parametrize("key", sorted(OWNED))
def test_a_key_that_octant_sets_names_the_option_to_use(cfg: Config, key: str) -> None:
    (violation,) = found(cfg, {key: 1})
    assert str(violation).startswith(f"[OCT312] runtime.deepspeed_extra.{key}=1: Octant sets this key of DeepSpeed")
    assert violation.way_out == f"Use {OWNED[key]}"
    assert all(word in options() for word in OWNED[key].split(" and "))


def test_a_key_that_deepspeed_would_ignore_names_the_nearest(cfg: Config) -> None:
    (violation,) = found(cfg, {"wall_clock_brakedown": True})
    assert str(violation).startswith("[OCT313] runtime.deepspeed_extra.wall_clock_brakedown=True: ")
    assert "DeepSpeed 0.19 has no such top-level key" in violation.rule
    assert "Nearest: wall_clock_breakdown" in violation.way_out


def test_every_bad_key_is_named(cfg: Config) -> None:
    assert [violation.code for violation in found(cfg, {"fp16": {}, "nonsense": 1, "timers": {}})] == [312, 313]


def test_keys_of_deepspeed_that_octant_leaves_alone_are_legal(cfg: Config) -> None:
    assert found(cfg, dict.fromkeys(KNOWN - OWNED.keys(), 1)) == []
