from __future__ import annotations

from copy import deepcopy
from itertools import combinations
from typing import Any

import pytest

from engine.config import (
    Activation,
    Config,
    DataConfig,
    DType,
    Norm,
    OptimConfig,
    OptimizerName,
    Positions,
    RunConfig,
    ScheduleName,
    Switch,
    TrainingConfig,
    WandbMode,
    rules,
)
from engine.study.cases import GLOBAL_BATCH, SGD_LR, Case, configure, covering_subset, enumerate_cases, with_flavour
from tests.helpers.models import preset

FIELDS = ("world", "pp", "tp", "zero", "accum", "flavour", "tied")


def base(**model: Any) -> Config:
    cfg = Config(
        model=deepcopy(preset("gpt_tiny")),
        data=DataConfig(source="random", seq_len=16, vocab_size=2000),
        optim=OptimConfig(lr=1e-3),
        train=TrainingConfig(steps=5, micro_batch=2),
        run=RunConfig(name="parity"),
    )
    for name, value in model.items():
        setattr(cfg.model, name, value)
    return cfg


def cases(cfg: Config | None = None, **asked: Any) -> list[Case]:
    everything: dict[str, Any] = {
        "worlds": [4],
        "pp": [1, 2, 4],
        "tp": [1, 2, 4],
        "zero": [0, 1, 2, 3],
        "accum": [1, 4],
        "flavours": ["gpt2", "llama"],
        "tied": [True, False],
    }
    return list(enumerate_cases(cfg or base(), **{**everything, **asked}))


def layouts(found: list[Case]) -> set[tuple[int, int, int]]:
    return {(case.pp, case.dp, case.tp) for case in found}


def test_four_ranks_by_hand() -> None:
    found = cases()
    assert layouts(found) == {(1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1)}
    # Three layouts without a pipeline take four ZeRO stages, three with one take two; each with 2 accumulations,
    # 2 flavours, tied or not.
    assert len(found) == (3 * 4 + 3 * 2) * 2 * 2 * 2
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_every_case_is_legal(world: int) -> None:
    found = cases(worlds=[world])
    assert found
    for case in found:
        cfg = configure(base(), case)
        assert rules.check(cfg, world) == []
        assert case.pp * case.dp * case.tp == world
        assert cfg.train.micro_batch * cfg.train.accum_steps * case.dp == GLOBAL_BATCH


@pytest.mark.parametrize(
    ("model", "absent"),
    [
        ({"num_heads": 6, "hidden_size": 96}, {(1, 1, 4)}),
        ({"num_kv_heads": 2}, {(1, 1, 4)}),
        ({"num_layers": 2}, {(4, 1, 1)}),
    ],
    ids=str,
)
def test_what_the_model_cannot_be_cut_into_is_left_out(
    model: dict[str, int], absent: set[tuple[int, int, int]]
) -> None:
    assert layouts(cases()) - layouts(cases(base(**model))) == absent


def test_pipelines_take_no_zero_2_and_3() -> None:
    assert {case.zero for case in cases(pp=[2, 4])} == {0, 1}
    assert cases(pp=[2], zero=[2, 3]) == []


def test_the_global_batch_must_come_out_even() -> None:
    # 8 replicas of 8 micro-batches would need half a sample each.
    assert {case.accum for case in cases(worlds=[8], pp=[1], tp=[1], accum=[4, 8])} == {4}
    assert cases(worlds=[3], pp=[1], tp=[1]) == []


@pytest.mark.parametrize("worlds", [[4], [1, 2, 4, 8]])
def test_a_covering_subset_meets_every_pair_of_values(worlds: list[int]) -> None:
    def pairs(found: list[Case]) -> set[tuple[tuple[str, Any], ...]]:
        return {pair for case in found for pair in combinations([(f, getattr(case, f)) for f in FIELDS], 2)}

    everything = cases(worlds=worlds)
    chosen = covering_subset(everything)
    assert set(chosen) <= set(everything)
    assert pairs(chosen) == pairs(everything)
    assert len(chosen) < len(everything) / 4
    order = [(case.world, case.pp, case.tp) for case in chosen]
    assert order == sorted(order), "cases of one grid share their ranks, so they come together"


def test_a_subset_of_nothing_and_of_one() -> None:
    one = cases()[:1]
    assert covering_subset([]) == []
    assert covering_subset(one) == one


def test_a_case_says_what_it_is() -> None:
    case = Case(world=8, pp=2, tp=2, zero=1, accum=4, flavour="llama", tied=False)
    assert str(case) == "pp2 dp2 tp2 zero1 accum4 llama-untied"
    assert case.model_key == "llama-untied"


def test_flavours_keep_the_sizes() -> None:
    cfg = base(num_kv_heads=4, ffn_size=352)
    gpt2, llama = with_flavour(cfg, "gpt2", True).model, with_flavour(cfg, "llama", False).model
    assert (gpt2.positions, gpt2.norm, gpt2.activation) == (Positions.learned, Norm.layernorm, Activation.gelu_tanh)
    assert (llama.positions, llama.norm, llama.activation) == (Positions.rotary, Norm.rmsnorm, Activation.swiglu)
    assert (gpt2.bias, llama.bias, gpt2.tied_head, llama.tied_head) == (True, False, True, False)
    for model in (gpt2, llama):
        assert (model.num_layers, model.hidden_size, model.num_kv_heads, model.ffn_size) == (4, 128, 4, 352)
    assert cfg.model == base(num_kv_heads=4, ffn_size=352).model, "the given config is left alone"


def test_a_case_is_compared_in_fp32_with_plain_sgd_and_without_chance() -> None:
    asked = base(dropout=0.1, attention_dropout=0.1)
    asked.precision.dtype, asked.precision.tf32 = DType.bf16, True
    asked.kernels.compile, asked.logging.wandb = Switch.on, WandbMode.online
    cfg = configure(asked, Case(world=8, pp=2, tp=2, zero=1, accum=4, flavour="gpt2", tied=True))
    assert (cfg.parallel.pp, cfg.parallel.tp, cfg.parallel.dp, cfg.zero.stage) == (2, 2, 2, 1)
    assert (cfg.train.accum_steps, cfg.train.micro_batch) == (4, 4)
    assert (cfg.model.dropout, cfg.model.attention_dropout) == (0.0, 0.0)
    assert (cfg.precision.dtype, cfg.precision.tf32) == (DType.fp32, False)
    assert (cfg.optim.name, cfg.optim.lr, cfg.optim.momentum) == (OptimizerName.sgd, SGD_LR, 0.0)
    assert (cfg.optim.schedule, cfg.optim.warmup_steps, cfg.optim.weight_decay) == (ScheduleName.constant, 0, 0.0)
    assert (cfg.kernels.compile, cfg.logging.wandb) == (Switch.off, WandbMode.disabled)
    assert cfg.optim.clip_norm > 0, "clipping is part of what is compared"
