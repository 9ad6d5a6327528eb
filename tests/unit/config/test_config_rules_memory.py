"""Rules of formats, offload, recomputation, families and learning-rate schedules: the messages are read."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.enums import (
    Device,
    DType,
    Family,
    Offload,
    OffloadStrategy,
    OptimizerName,
    Positions,
    Recompute,
    ScheduleName,
    SentenceHead,
    Transport,
)
from engine.config.rules import check
from tests.helpers.configs import make

CPU, NVME = Offload.cpu, Offload.nvme
# What zenflow and superoffload need, but for an optimizer in host memory.
SPECIAL = {"zero__stage": 3, "checkpoint__save_final": False}
ZENFLOW, SUPER = OffloadStrategy.zenflow, OffloadStrategy.superoffload

# changes, code, option=value, words of the rule, words of the way out
CASES: list[tuple[dict[str, Any], int, str, str, str]] = [
    (
        {"zero__stage": 0, "precision__dtype": DType.fp16},
        314,
        "zero.stage=0",
        "for a fp16 model only DeepSpeed's ZeRO optimizers",
        "Use zero.stage=1",
    ),
    (
        {"precision__states": DType.bf16, "precision__dtype": DType.bf16, "zero__stage": 2},
        379,
        "precision.states=bf16",
        "bf16 states are AdamW's at ZeRO-1 of a bf16 model, offloaded or not, and here is zero.stage=2",
        "Use precision.states=fp32",
    ),
    (
        {"precision__states": DType.fp16},
        379,
        "precision.states=fp16",
        "fp16 would lose small moments",
        "Use precision.states=fp32",
    ),
    (
        {"precision__loss_scale": 1024.0, "precision__dtype": DType.bf16},
        316,
        "precision.loss_scale=1024.0",
        "precision.dtype is bf16",
        "Use precision.loss_scale=null, or precision.dtype=fp16",
    ),
    (
        {"zero__offload_optimizer": CPU, "optim__name": OptimizerName.muon},
        317,
        "zero.offload_optimizer=cpu",
        "muon looks at whole matrices",
        "Use zero.offload_optimizer=none, or an optim.name of adamw, lion, sgd",
    ),
    (
        {"zero__gather": Transport.copy_engine, "zero__stage": 1, "train__device": Device.cpu},
        320,
        "zero.gather=copy_engine",
        "copy engines read the parts that stage 3 keeps on other GPUs, without offload, and here is zero.stage=1, "
        "train.device=cpu",
        "Use zero.gather=auto",
    ),
    (
        {"zero__gather": Transport.copy_engine, "zero__stage": 3, "zero__offload_params": CPU},
        320,
        "zero.gather=copy_engine",
        "and here is zero.offload_params=cpu",
        "Use zero.gather=auto",
    ),
    (
        {"zero__offload_params": CPU, "zero__stage": 2},
        340,
        "zero.offload_params=cpu",
        "at zero.stage=3 only, and zero.stage is 2",
        "Use zero.stage=3, or zero.offload_params=none",
    ),
    (
        {"zero__offload_optimizer": NVME, "zero__nvme_path": "disk"},
        341,
        "zero.offload_optimizer=nvme",
        "at zero.stage=3 only, and zero.stage is 1",
        "Use zero.stage=3, or zero.offload_optimizer=cpu",
    ),
    (
        {"zero__offload_optimizer": NVME, "zero__offload_params": NVME, "zero__stage": 3},
        342,
        "zero.nvme_path=None",
        "zero.offload_optimizer and zero.offload_params need a folder on a local NVMe disk",
        "Use zero.nvme_path=FOLDER, or cpu instead of nvme",
    ),
    (
        {"zero__offload_optimizer": CPU, "zero__stage": 0},
        343,
        "zero.offload_optimizer=cpu",
        "zero.stage is 0",
        "Use zero.stage=1, or zero.offload_optimizer=none",
    ),
    (
        {"zero__offload_ratio": 0.5, "zero__stage": 3},
        344,
        "zero.offload_ratio=0.5",
        "here is adamw, none, zero.stage=3 in fp32 with zero.offload_strategy=auto",
        "Use zero.offload_ratio=1, or 'zero.stage=3 optim.name=adamw zero.offload_optimizer=cpu'",
    ),
    (
        {**SPECIAL, "zero__offload_strategy": ZENFLOW},
        346,
        "zero.offload_strategy=zenflow",
        "zero.offload_optimizer is none",
        "Use zero.offload_optimizer=cpu, or zero.offload_strategy=plain",
    ),
    (
        {"zero__offload_strategy": SUPER, "zero__offload_optimizer": CPU, "zero__stage": 2},
        347,
        "zero.offload_strategy=superoffload",
        "zero.stage=3 only, and zero.stage is 2",
        "Use zero.stage=3, or zero.offload_strategy=plain",
    ),
    (
        {
            **SPECIAL,
            "zero__offload_strategy": ZENFLOW,
            "zero__offload_optimizer": CPU,
            "optim__name": OptimizerName.lion,
        },
        348,
        "zero.offload_strategy=zenflow",
        "for adamw only, and optim.name is lion",
        "Use optim.name=adamw, or zero.offload_strategy=plain",
    ),
    (
        {**SPECIAL, "zero__offload_strategy": ZENFLOW, "zero__offload_optimizer": CPU, "train__device": Device.cpu},
        349,
        "zero.offload_strategy=zenflow",
        "train.device is cpu",
        "Use train.device=cuda, or zero.offload_strategy=plain",
    ),
    (
        {"zero__offload_strategy": ZENFLOW, "zero__offload_optimizer": CPU, "zero__stage": 3},
        357,
        "zero.offload_strategy=zenflow",
        "so the weights that are written would lack them",
        "Use checkpoint.save_final=false, or zero.offload_strategy=plain",
    ),
    (
        {**SPECIAL, "zero__offload_strategy": SUPER, "zero__offload_optimizer": CPU, "precision__dtype": DType.fp16},
        358,
        "zero.offload_strategy=superoffload",
        "before the loss scale is taken out of fp16 gradients",
        "Use precision.dtype=bf16, or zero.offload_strategy=plain",
    ),
    (
        {"precision__grad_accum": DType.fp16, "precision__dtype": DType.bf16, "zero__stage": 1},
        359,
        "precision.grad_accum=fp16",
        "gradients of a bf16 model are added up in bf16 or fp32",
        "Use precision.grad_accum=fp32",
    ),
    (
        {"precision__grad_accum": DType.bf16},
        359,
        "precision.grad_accum=bf16",
        "gradients of a fp32 model are added up in fp32",
        "Use precision.grad_accum=fp32",
    ),
    (
        {"train__recompute_interval": 2, "train__recompute": Recompute.selective},
        350,
        "train.recompute_interval=2",
        "only whole blocks are recomputed in groups, and train.recompute is selective",
        "Use train.recompute_interval=1, or train.recompute=full",
    ),
    (
        {"train__recompute_nested": True, "train__recompute": Recompute.full},
        394,
        "train.recompute_nested=True",
        "it takes groups of at least 2 blocks apart, and train.recompute is full with groups of 1",
        "Use train.recompute_nested=false, or 'train.recompute=full train.recompute_interval=2'",
    ),
    (
        {"train__recompute_nested": True, "train__recompute": Recompute.selective},
        394,
        "train.recompute_nested=True",
        "and train.recompute is selective with groups of 1",
        "Use train.recompute_nested=false, or 'train.recompute=full train.recompute_interval=2'",
    ),
    (
        {"train__recompute_offload": True},
        395,
        "train.recompute_offload=True",
        "the inputs of recomputed blocks go to host memory, and train.recompute is none",
        "Use train.recompute_offload=false, or train.recompute=full",
    ),
    (
        {"train__tile_tokens": 0},
        301,
        "train.tile_tokens=0",
        "must be at least 1",
        "Use train.tile_tokens=1",
    ),
    (
        {"model__family": Family.bert, "model__positions": Positions.rotary},
        351,
        "model.positions=rotary",
        "the bert family adds a learned table",
        "Use model.positions=learned, or model.family=gpt",
    ),
    (
        {"model__family": Family.bert, "model__sentence_head": SentenceHead.next_sentence, "model__token_types": 1},
        352,
        "model.sentence_head=next_sentence",
        "by their segment embeddings, and token_types is 1",
        "Use model.token_types=2, or model.sentence_head=none",
    ),
    (
        {"model__token_types": 2},
        353,
        "model.token_types=2",
        "the gpt family has no segment embeddings",
        "Use model.token_types=0, or model.family=bert",
    ),
    (
        {"model__sentence_head": SentenceHead.sentence_order},
        354,
        "model.sentence_head=sentence_order",
        "the gpt family has no sentence head",
        "Use model.sentence_head=none, or model.family=bert",
    ),
    (
        {"optim__schedule": ScheduleName.wsd, "optim__warmup_steps": 4, "optim__cooldown_steps": 7},
        355,
        "optim.cooldown_steps=7",
        "warm-up 4 and cooldown 7 are together longer than the 10 steps they share",
        "Use optim.cooldown_steps=6, or optim.warmup_steps=3",
    ),
    ({"zero__offload_ratio": 0.0}, 301, "zero.offload_ratio=0.0", "greater than 0 and at most 1", "Use a number"),
    ({"train__label_smoothing": 1.0}, 301, "train.label_smoothing=1.0", "less than 1", "default"),
]


# What zenflow and superoffload need, but for an optimizer in host memory.
SPECIAL = {"zero__stage": 3, "checkpoint__save_final": False}


@pytest.mark.parametrize(("changes", "code", "head", "rule", "way_out"), CASES, ids=[f"{c[1]}-{c[2]}" for c in CASES])
def test_one_broken_rule(changes: dict[str, Any], code: int, head: str, rule: str, way_out: str) -> None:
    (violation,) = check(make(**changes), 1)
    assert str(violation).startswith(f"[OCT{code}] {head}: ")
    assert rule in violation.rule
    assert way_out in violation.way_out


@pytest.mark.parametrize(
    "changes",
    [
        {"zero__offload_optimizer": CPU, "zero__stage": 1, "optim__name": OptimizerName.lion},
        {"zero__offload_optimizer": CPU, "zero__offload_params": CPU, "zero__stage": 3, "zero__offload_ratio": 0.5},
        {"zero__offload_optimizer": NVME, "zero__offload_params": NVME, "zero__stage": 3, "zero__nvme_path": "disk"},
        {"zero__offload_params": CPU, "zero__stage": 3, "optim__name": OptimizerName.muon},
        {**SPECIAL, "zero__offload_optimizer": CPU, "zero__offload_strategy": ZENFLOW, "train__device": Device.cuda},
        {"zero__offload_optimizer": CPU, "zero__offload_strategy": SUPER, "zero__stage": 3},
        {"train__recompute": Recompute.full, "train__recompute_interval": 3},
        {"train__recompute": Recompute.full, "train__recompute_interval": 2, "train__recompute_nested": True},
        {"train__recompute": Recompute.full, "train__recompute_offload": True},
        {"model__family": Family.bert},
        {"model__family": Family.bert, "model__token_types": 2, "model__sentence_head": SentenceHead.sentence_order},
        {"model__family": Family.bert, "train__label_smoothing": 0.1, "train__z_loss": 1e-4},
        {"optim__schedule": ScheduleName.wsd, "optim__warmup_steps": 4, "optim__cooldown_steps": 6},
        {"optim__warmup_steps": 4, "optim__cooldown_steps": 7},
        {"model__mup_base_width": 16, "optim__name": OptimizerName.lamb},
    ],
    ids=str,
)
def test_just_inside_a_rule_is_legal(changes: dict[str, Any]) -> None:
    assert check(make(**changes), 1) == []
