from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import Activation, Balance, ModelConfig, Norm, Positions
from engine.plan.costs import flops_per_token, layer_costs, parameter_counts, total_parameters

GPT2 = ModelConfig(
    name="gpt2", num_layers=12, hidden_size=768, num_heads=12, vocab_size=50257, max_positions=1024, tied_head=True
)
LLAMA = ModelConfig(
    name="llama",
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    ffn_size=14336,
    vocab_size=128256,
    max_positions=8192,
    positions=Positions.rotary,
    norm=Norm.rmsnorm,
    activation=Activation.swiglu,
    bias=False,
    tied_head=False,
)


def test_published_totals() -> None:
    assert total_parameters(GPT2) == 124_439_808
    assert total_parameters(LLAMA) == 8_030_261_248


def test_layers_in_the_order_of_the_pipeline() -> None:
    assert list(parameter_counts(replace(GPT2, num_layers=2))) == [
        "embed.tokens",
        "embed.positions",
        "block.0",
        "block.1",
        "final_norm",
        "head",
    ]
    assert list(parameter_counts(replace(LLAMA, num_layers=1))) == ["embed.tokens", "block.0", "final_norm", "head"]
    for model in (GPT2, LLAMA):
        assert 0 not in list(parameter_counts(replace(model, dropout=0.1, tied_head=False)).values())


def test_padding_of_the_vocabulary_is_not_counted() -> None:
    assert total_parameters(replace(GPT2, vocab_multiple=1024)) == total_parameters(GPT2)


def test_one_block_by_hand() -> None:
    model = ModelConfig(
        name="m", num_layers=1, hidden_size=6, num_heads=3, num_kv_heads=1, head_dim=4, ffn_size=5, vocab_size=7,
        max_positions=8, bias=False, activation=Activation.swiglu,
    )  # fmt: skip
    attention = 6 * 12 + 2 * 6 * 4 + 12 * 6
    feed_forward = 3 * 6 * 5
    assert parameter_counts(model)["block.0"] == attention + feed_forward + 2 * 6
    biases = 12 + 2 * 4 + 6 + 2 * 5 + 6
    assert parameter_counts(replace(model, bias=True))["block.0"] == attention + feed_forward + biases + 4 * 6
    rms = replace(model, bias=True, norm=Norm.rmsnorm)
    assert parameter_counts(rms)["block.0"] == attention + feed_forward + biases + 2 * 6


def test_parameter_costs_count_a_tied_head_once() -> None:
    costs = layer_costs(GPT2, Balance.parameters, 1024)
    assert (costs[0], costs[-1]) == (50257 * 768, 0)
    assert sum(costs) == total_parameters(GPT2)
    assert layer_costs(LLAMA, Balance.parameters, 8192)[-1] == 128256 * 4096


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=lambda m: m.name)
def test_flop_costs_of_layers_are_a_third_of_training(model: ModelConfig) -> None:
    costs = layer_costs(model, Balance.flops, 1024)
    assert len(costs) == len(parameter_counts(model))
    assert costs[0] == 0
    assert costs[-1] == 2 * model.vocab_size * model.hidden_size
    assert 3 * sum(costs) == pytest.approx(flops_per_token(model, 1024)[0], rel=1e-12)


def test_flops_per_token_conventions() -> None:
    causal, full = flops_per_token(GPT2, 1024)
    weights = 124_439_808 - 1024 * 768
    attention = 12 * 768 * 1024
    assert (causal, full) == (6 * weights + 6 * attention, 6 * weights + 12 * attention)


def test_an_untied_head_costs_the_same_flops() -> None:
    assert flops_per_token(replace(GPT2, tied_head=False), 64) == flops_per_token(GPT2, 64)


def test_attention_flops_use_the_width_of_the_heads_not_of_the_model() -> None:
    wide = replace(GPT2, head_dim=128)
    causal, full = flops_per_token(wide, 1000)
    assert full - causal == 6 * 12 * 12 * 128 * 1000
