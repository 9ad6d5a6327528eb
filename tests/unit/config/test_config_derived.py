from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import ModelConfig, OptimConfig, ParallelConfig
from engine.config.derived import (
    ffn_size,
    head_dim,
    is_causal,
    kv_heads,
    padded_vocab,
    parts_per_rank,
    qkv_bias,
    rotary_dim,
    sequence_multiple,
    warmup_steps,
)
from engine.config.enums import Family, PipelineSchedule

MODEL = ModelConfig(name="m", num_layers=2, hidden_size=48, num_heads=6, vocab_size=50257, max_positions=64)


def test_sizes_that_are_not_set_follow_from_the_others() -> None:
    assert (head_dim(MODEL), kv_heads(MODEL), ffn_size(MODEL), rotary_dim(MODEL)) == (8, 6, 192, 8)
    assert [qkv_bias(replace(MODEL, bias=bias)) for bias in (True, False)] == [True, False]


def test_sizes_that_are_set_win() -> None:
    model = replace(MODEL, head_dim=16, num_kv_heads=2, ffn_size=100)
    assert (head_dim(model), kv_heads(model), ffn_size(model)) == (16, 2, 100)
    assert [qkv_bias(replace(MODEL, bias=not biases, qkv_bias=biases)) for biases in (True, False)] == [True, False]
    assert [rotary_dim(replace(model, rotary_fraction=share)) for share in (0.25, 0.3, 1.0)] == [4, 4, 16]


@pytest.mark.parametrize(("vocab", "tp", "rows"), [(50257, 1, 50304), (50257, 8, 50688), (128, 2, 128), (129, 2, 256)])
def test_padded_vocabulary(vocab: int, tp: int, rows: int) -> None:
    assert padded_vocab(replace(MODEL, vocab_size=vocab), tp) == rows


@pytest.mark.parametrize(("asked", "steps", "warmup"), [(None, 1000, 50), (None, 19, 0), (0, 1000, 0), (7, 1000, 7)])
def test_warm_up_is_a_twentieth_of_the_run_unless_asked(asked: int | None, steps: int, warmup: int) -> None:
    assert warmup_steps(OptimConfig(lr=1.0, warmup_steps=asked), steps) == warmup


def test_only_gpt_is_causal() -> None:
    assert is_causal(MODEL)
    assert not is_causal(replace(MODEL, family=Family.bert))


@pytest.mark.parametrize(("sequence", "multiple"), [(False, 3), (True, 12)])
def test_sequences_are_cut_over_context_and_with_sequence_parallelism_over_tp(sequence: bool, multiple: int) -> None:
    assert sequence_multiple(ParallelConfig(context=3, tp=4, sequence=sequence)) == multiple


@pytest.mark.parametrize(("schedule", "parts"), [("one_f_one_b", 1), ("interleaved", 3), ("dualpipev", 2)])
def test_parts_of_the_model_on_a_rank(schedule: str, parts: int) -> None:
    asked = ParallelConfig(pp=2, virtual_stages=3, schedule=PipelineSchedule[schedule])
    assert parts_per_rank(asked) == parts
