from __future__ import annotations

from typing import Any

import pytest

from engine.config.enums import DType, Offload, OffloadStrategy
from engine.config.rules import check
from tests.helpers.configs import make

CPU = Offload.cpu
STREAMED = {"zero__offload_optimizer": CPU, "precision__dtype": DType.bf16}

# changes, code, option=value, words of the rule, words of the way out
CASES: list[tuple[dict[str, Any], int, str, str, str]] = [
    (
        {**STREAMED, "precision__states": DType.bf16, "zero__offload_strategy": OffloadStrategy.plain},
        379,
        "precision.states=bf16",
        "and here is zero.offload_strategy=plain",
        "Use precision.states=fp32",
    ),
    (
        {"zero__offload_strategy": OffloadStrategy.streamed, "zero__stage": 2},
        318,
        "zero.offload_strategy=streamed",
        "and here is precision.dtype=fp32, zero.stage=2, zero.offload_optimizer=none",
        "Use zero.offload_strategy=auto, or 'optim.name=adamw precision.dtype=bf16 zero.stage=1 "
        "zero.offload_optimizer=cpu'",
    ),
    (
        {"zero__offload_delay": 1, "zero__offload_optimizer": CPU},
        319,
        "zero.offload_delay=1",
        "only weights whose state is streamed lag behind, and here is precision.dtype=fp32",
        "Use zero.offload_delay=0, or 'optim.name=adamw precision.dtype=bf16 zero.stage=1 "
        "zero.offload_optimizer=cpu zero.offload_strategy=auto'",
    ),
    (
        {**STREAMED, "zero__offload_delay": 1, "zero__offload_strategy": OffloadStrategy.plain},
        319,
        "zero.offload_delay=1",
        "and here is zero.offload_strategy=plain",
        "Use zero.offload_delay=0",
    ),
    ({**STREAMED, "zero__offload_delay": 2}, 301, "zero.offload_delay=2", "at most 1", "Use zero.offload_delay=1"),
    (
        {**STREAMED, "zero__offload_ratio": 0.5, "zero__offload_strategy": OffloadStrategy.plain},
        344,
        "zero.offload_ratio=0.5",
        "here is adamw, cpu, zero.stage=1 in bf16 with zero.offload_strategy=plain",
        "Use zero.offload_ratio=1, or 'zero.stage=3 optim.name=adamw zero.offload_optimizer=cpu'",
    ),
]


@pytest.mark.parametrize(("changes", "code", "head", "rule", "way_out"), CASES, ids=[f"{c[1]}-{c[2]}" for c in CASES])
def test_what_cannot_be_streamed_is_refused(
    changes: dict[str, Any], code: int, head: str, rule: str, way_out: str
) -> None:
    (violation,) = check(make(**changes), 1)
    assert str(violation).startswith(f"[OCT{code}] {head}: ")
    assert rule in violation.rule
    assert way_out in violation.way_out


@pytest.mark.parametrize("strategy", [OffloadStrategy.auto, OffloadStrategy.streamed])
def test_a_share_of_bf16_states_may_lag(strategy: OffloadStrategy) -> None:
    more = {"zero__offload_delay": 1, "zero__offload_ratio": 0.5, "precision__states": DType.bf16}
    assert check(make(**STREAMED, **more, zero__offload_strategy=strategy), 1) == []
