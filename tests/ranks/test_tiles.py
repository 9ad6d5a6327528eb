"""Tiles, nested recomputation and inputs in host memory give the gradients of one plain process in every layout."""

from __future__ import annotations

import pytest

from engine.config.enums import DType
from engine.study.cases import Case
from engine.study.run import run_cases
from tests.ranks.test_parity import tiny

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]

CASES = [
    Case(world=2, zero=3, tiles="block", recompute="nested2", flavour="bert"),
    Case(world=2, zero=3, tiles="mlp", recompute="offload2", flavour="llama", accum=4),
    Case(world=2, zero=3, tiles="block", recompute="selective", flavour="neox", dropout=0.1),
    Case(world=2, zero=0, tiles="block", flavour="qwen2", length="variable", packed=True),
    Case(world=2, tp=2, sequence=True, tiles="block", flavour="llama", recompute="nested2"),
    Case(world=2, tp=2, sequence=True, tiles="mlp", zero=2, flavour="bert", recompute="offload2"),
    Case(world=2, context=2, zero=3, tiles="block", flavour="llama", recompute="full"),
    Case(world=2, pp=2, schedule="interleaved", accum=4, tiles="block", recompute="offload2"),
    Case(world=2, pp=2, schedule="dualpipev", accum=8, tiles="mlp", recompute="nested2", flavour="llama"),
]


def test_every_layout_agrees_with_one_process() -> None:
    *_, rows = run_cases(tiny("train.steps=5"), CASES, timeout_s=120)
    for row in rows:
        assert row["failed"] == [], row["case"]
        assert row["errors"]["gradient"] <= 1e-6, row["case"]


def test_in_bf16_sums_over_tiles_lose_no_more_than_one_product() -> None:
    cfg = tiny("train.steps=4")
    cfg.precision.dtype = DType.bf16
    cases = [
        Case(world=2, tp=2, sequence=True, zero=2, tiles="block", flavour="llama", tied=False),
        Case(world=2, zero=3, tiles="mlp", recompute="nested2"),
    ]
    *_, rows = run_cases(cfg, cases, timeout_s=120)
    for row in rows:
        assert row["failed"] == [], row["case"]
        assert 0 < row["errors"]["gradients"] <= 2.0, row["case"]
