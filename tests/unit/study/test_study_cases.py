from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest

from engine.config import Config, DataConfig, OptimConfig, RunConfig, TrainingConfig, rules
from engine.config.enums import (
    Activation,
    Attention,
    DType,
    Family,
    Norm,
    PipelineSchedule,
    Positions,
    Recompute,
    ScheduleName,
    SentenceHead,
    Switch,
    Tiles,
    WandbMode,
)
from engine.study.cases import (
    FREE,
    GLOBAL_BATCH,
    LAYOUT,
    LOSS_SCALE,
    Case,
    configure,
    is_legal,
    model_key,
    oracle_config,
    with_flavour,
)
from engine.study.covering import Space
from tests.helpers.models import preset


def base(**model: Any) -> Config:
    cfg = Config(
        model=deepcopy(preset("gpt_tiny")),
        data=DataConfig(source="random", seq_len=16, vocab_size=2000),
        optim=OptimConfig(lr=1e-3),
        train=TrainingConfig(steps=10, micro_batch=2),
        run=RunConfig(name="parity"),
    )
    for name, value in model.items():
        setattr(cfg.model, name, value)
    return cfg


def layouts(cfg: Config, **asked: Any) -> set[tuple[int, int, int, int]]:
    one = {name: values[:1] for name, values in {**LAYOUT, **FREE}.items()}
    degrees = {name: LAYOUT[name] for name in ("pp", "tp", "context", "flavour")}
    space = Space(cfg, {**one, **degrees, "world": (4,), **asked})
    cases = [space.case(number) for number in range(len(space))]
    return {(case.pp, case.dp, case.context, case.tp) for case in cases}


def test_four_ranks_by_hand() -> None:
    flat = {(1, 4, 1, 1), (1, 2, 1, 2), (1, 1, 1, 4), (2, 2, 1, 1), (2, 1, 1, 2), (4, 1, 1, 1)}
    with_context = {(1, 2, 2, 1), (1, 1, 2, 2), (2, 1, 2, 1), (1, 1, 4, 1)}
    assert layouts(base()) == flat | with_context


@pytest.mark.parametrize(
    ("model", "absent"),
    [
        ({"num_heads": 6, "hidden_size": 96}, {(1, 1, 1, 4), (1, 1, 4, 1), (1, 1, 2, 2)}),
        ({"num_kv_heads": 2}, {(1, 1, 1, 4)}),
        ({"num_layers": 2}, {(4, 1, 1, 1)}),
    ],
    ids=str,
)
def test_what_the_model_cannot_be_cut_into_is_left_out(
    model: dict[str, int], absent: set[tuple[int, int, int, int]]
) -> None:
    assert layouts(base()) - layouts(base(**model)) == absent


def test_pipelines_take_no_zero_3() -> None:
    for stage in (0, 1, 2, 3):
        assert is_legal(base(), Case(world=2, pp=2, zero=stage)) is (stage < 3)


def test_the_global_batch_comes_out_even() -> None:
    # 8 replicas of 8 micro-batches would need half a sample each.
    assert is_legal(base(), Case(world=8, accum=4))
    assert not is_legal(base(), Case(world=8, accum=8))


def test_sequence_parallelism_of_one_rank_is_no_case_of_its_own() -> None:
    assert is_legal(base(), Case(world=2, tp=2, sequence=True))
    assert not is_legal(base(), Case(world=2, sequence=True))


def test_bert_has_no_documents_to_keep_apart() -> None:
    assert is_legal(base(), Case(world=2, packed=True))
    assert is_legal(base(), Case(world=2, packed=True, flavour="llama", length="variable"))
    assert not is_legal(base(), Case(world=2, packed=True, flavour="bert"))


def test_a_case_says_what_it_is() -> None:
    case = Case(
        world=8, pp=2, tp=2, context=2, sequence=True, schedule="interleaved", zero=2, accum=4, offload="cpu",
        flavour="llama", packed=True, recompute="full2", tiles="mlp", tied=False, dropout=0.1, length="variable",
        loss="smoothed",
    )  # fmt: skip
    assert str(case) == (
        "pp2 interleaved dp1 cp2 tp2+sequence zero2+offload accum4 recompute-full2 tiles-mlp llama untied packed "
        "dropout0.1 variable smoothed"
    )
    assert model_key(base(), case) == "llama-untied-packed-dropout0.1-variable-smoothed-4blocks"
    assert str(Case(world=2)) == "pp1 dp2 tp1 zero1 accum1 gpt2 tied"


def test_flavours_keep_the_sizes() -> None:
    cfg = base(ffn_size=352)
    gpt2, llama, bert = (with_flavour(cfg, name, name == "gpt2").model for name in ("gpt2", "llama", "bert"))
    assert (gpt2.positions, gpt2.norm, gpt2.activation) == (Positions.learned, Norm.layernorm, Activation.gelu_tanh)
    assert (llama.positions, llama.norm, llama.activation) == (Positions.rotary, Norm.rmsnorm, Activation.swiglu)
    assert (gpt2.bias, llama.bias, gpt2.tied_head, llama.tied_head) == (True, False, True, False)
    assert (gpt2.num_kv_heads, llama.num_kv_heads, bert.num_kv_heads) == (None, 4, None)
    neox, qwen2 = (with_flavour(cfg, name, True).model for name in ("neox", "qwen2"))
    assert (neox.positions, neox.norm, neox.activation) == (Positions.rotary, Norm.layernorm, Activation.gelu)
    assert (neox.parallel_residual, neox.rotary_fraction, neox.bias, neox.num_kv_heads) == (True, 0.25, True, None)
    assert (qwen2.qkv_bias, qwen2.bias) == (True, False)
    qwen2.qkv_bias, qwen2.tied_head = None, False
    assert qwen2 == llama
    for model in (gpt2, llama, bert, neox):
        assert (model.num_layers, model.hidden_size, model.num_heads, model.ffn_size) == (4, 128, 8, 352)
    assert cfg == base(ffn_size=352), "the given config is left alone"


def test_bert_is_that_of_the_preset_whatever_the_base() -> None:
    want, got = preset("bert_tiny"), with_flavour(base(), "bert", True).model
    want.name = got.name
    assert got == want
    back = with_flavour(with_flavour(base(), "bert", True), "gpt2", True).model
    assert (back.family, back.sentence_head, back.token_types) == (Family.gpt, SentenceHead.none, 0)
    assert back == base().model
    for name in ("neox", "qwen2"):
        assert (
            with_flavour(with_flavour(base(num_kv_heads=8), name, True), "gpt2", True).model
            == base(num_kv_heads=8).model
        )


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        (Case(world=4, pp=4, accum=4), 4),
        (Case(world=4, pp=4, accum=4, schedule="interleaved"), 8),
        (Case(world=4, pp=4, accum=8, schedule="dualpipev"), 8),
        (Case(world=2, pp=2, accum=4, schedule="interleaved"), 4),
    ],
    ids=str,
)
def test_the_model_is_as_deep_as_the_schedule_needs_on_both_sides(case: Case, layers: int) -> None:
    assert configure(base(), case).model.num_layers == layers
    assert oracle_config(base(), case).model.num_layers == layers


def test_a_case_sets_what_it_names() -> None:
    case = Case(
        world=8, pp=2, tp=2, context=2, sequence=True, schedule="interleaved", zero=2, accum=4,
        packed=True, recompute="full2", tiles="block", dropout=0.1, length="variable", loss="smoothed",
    )  # fmt: skip
    cfg = configure(base(), case)
    parallel, train = cfg.parallel, cfg.train
    assert (parallel.pp, parallel.tp, parallel.dp, parallel.context, parallel.sequence) == (2, 2, 1, 2, True)
    assert (parallel.schedule, parallel.virtual_stages) == (PipelineSchedule.interleaved, 2)
    assert (cfg.zero.stage, train.accum_steps, train.micro_batch) == (2, 4, GLOBAL_BATCH // 4)
    assert (train.recompute, train.recompute_interval) == (Recompute.full, 2)
    # Three tiles of this rank's positions in each of 8 samples.
    assert (train.tiles, train.tile_tokens) == (Tiles.block, 8 * math.ceil(cfg.data.seq_len / 2 / 3))
    assert oracle_config(base(), case).train.tiles is Tiles.none
    assert (train.label_smoothing, train.z_loss, cfg.data.variable_length) == (0.1, 1e-3, True)
    assert cfg.data.document_mask
    assert oracle_config(base(), case).data.document_mask, "the oracle computes the same"
    assert (cfg.model.dropout, cfg.model.attention_dropout) == (0.1, 0.1)
    assert cfg.kernels.attention is Attention.reference, "only its masks are the same in every layout"
    assert rules.check(cfg, 8) == []


def test_a_case_is_without_what_it_does_not_name() -> None:
    asked = base(dropout=0.1, attention_dropout=0.1)
    asked.precision.tf32 = True
    asked.kernels.compile = asked.kernels.cuda_graphs = Switch.on
    asked.logging.wandb = WandbMode.online
    asked.train.recompute, asked.data.variable_length, asked.data.document_mask = Recompute.full, True, True
    cfg = configure(asked, Case(world=8, pp=2, tp=2, accum=4))
    assert (cfg.model.dropout, cfg.model.attention_dropout, cfg.kernels.attention) == (0.0, 0.0, Attention.auto)
    assert (cfg.train.recompute, cfg.data.variable_length, cfg.precision.tf32) == (Recompute.none, False, False)
    assert not cfg.data.document_mask
    assert (cfg.optim.schedule, cfg.optim.warmup_steps) == (ScheduleName.constant, 0)
    assert (cfg.kernels.compile, cfg.kernels.cuda_graphs) == (Switch.on, Switch.off)
    assert cfg.logging.wandb is WandbMode.disabled
    assert cfg.optim.clip_norm > 0, "clipping is part of what is compared"


def test_the_oracle_is_in_fp32_whatever_the_case_is_in() -> None:
    asked = base()
    asked.precision.dtype = DType.fp16
    case = Case(world=2, pp=2, zero=2, recompute="full", dropout=0.1)
    cfg, oracle = configure(asked, case), oracle_config(asked, case)
    assert (cfg.precision.dtype, cfg.precision.loss_scale) == (DType.fp16, LOSS_SCALE)
    assert (oracle.precision.dtype, oracle.precision.loss_scale) == (DType.fp32, None)
    assert (oracle.parallel.pp, oracle.zero.stage, oracle.train.recompute) == (1, 0, Recompute.none)
    assert oracle.model == cfg.model
