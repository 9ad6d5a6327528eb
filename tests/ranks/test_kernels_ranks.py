"""A model whose operations are all Triton's, in its interpreter, trains as one of torch's does, in one process."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from engine.config.enums import OptimizerName
from engine.config.load import load
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.study import cases, measure, parity
from engine.study.cases import Case, configure, oracle_config
from engine.study.compare import FP32, Comparison, compare
from engine.study.measure import measure_oracle, measure_ranks
from engine.topology.grid import Grid
from engine.train.kernels import choose_kernels
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

CASES = {
    "gpt2 on tp": Case(world=2, tp=2, zero=1, loss="smoothed"),
    "llama on tp, cut sequences": Case(world=2, tp=2, sequence=True, zero=2, flavour="llama", tied=False),
    "bert on pp, tied": Case(world=2, pp=2, zero=1, accum=2, flavour="bert", length="variable"),
    "neox on cp, recomputed": Case(world=2, context=2, zero=0, flavour="neox", recompute="full"),
    "gpt2 on ZeRO-3, tied": Case(world=2, zero=3, accum=2),
    "llama on ZeRO-3": Case(world=2, zero=3, flavour="llama", tied=False),
}


def tiny() -> Config:
    words = ["model=gpt_tiny", "kernels=fused", "train.device=cpu", "train.steps=2", "data.seq_len=8"]
    sizes = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.vocab_size=100"]
    return load([*parity.DEFAULTS, *words, *sizes, "data.vocab_size=100", "model.vocab_multiple=8"])


def on_ranks(names: list[str]) -> list[Comparison]:
    found = []
    # The interpreter is slow.
    for module in (cases, measure):
        mock.patch.object(module, "GLOBAL_BATCH", 4).start()
    for name in names:
        case, base, device = CASES[name], tiny(), torch.device("cpu")
        oracle = measure_oracle(oracle_config(base, case), device)
        ctx = ParallelContext.create(Grid(pp=case.pp, dp=case.dp, cp=case.context, tp=case.tp), device)
        cfg = configure(base, case)
        adamw = replace(cfg, optim=replace(cfg.optim, name=OptimizerName.adamw))
        assert {choice.impl.name for choice in choose_kernels(adamw, device).choices.values()} == {"triton"}
        measured = measure_ranks(cfg, ctx)
        found.append(compare(measured, oracle) if ctx.is_main else Comparison())
    return found


def test_layouts_of_triton_agree_with_one_process_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Named so, gloo's ranks are new processes: Triton reads the variable when it is imported.
    results = run_ranks(on_ranks, 2, (list(CASES),), backend="cpu:gloo", timeout_s=200)[0]
    for name, result in zip(CASES, results, strict=True):
        assert result.failures(FP32) == [], name
        assert result.errors["gradient"] > 0
