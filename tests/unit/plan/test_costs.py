from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.config import Activation, Balance, Config, ModelConfig, Norm, Positions
from engine.config.enums import Family, SentenceHead
from engine.dist.context import ParallelContext
from engine.model.build import build_layers
from engine.model.layers import owner_of
from engine.plan.costs import flops_per_token, layer_costs, parameter_counts, total_parameters
from engine_kernels.ops import Kernels
from engine_kernels.reference.attention import attention
from tests.helpers.configs import make

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

BERT = ModelConfig(
    name="bert",
    family=Family.bert,
    num_layers=12,
    hidden_size=768,
    num_heads=12,
    vocab_size=30522,
    max_positions=512,
    activation=Activation.gelu,
    token_types=2,
    sentence_head=SentenceHead.next_sentence,
)


def test_published_totals() -> None:
    assert total_parameters(BERT) == 110_106_428
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
    assert list(parameter_counts(replace(BERT, num_layers=1))) == [
        "embed.tokens",
        "embed.rest",
        "block.0",
        "head.transform",
        "head",
        "head.bias",
    ]
    for model in (GPT2, LLAMA, BERT):
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
    assert parameter_counts(replace(model, qkv_bias=True))["block.0"] == attention + feed_forward + 12 + 2 * 4 + 2 * 6
    rms = replace(model, bias=True, norm=Norm.rmsnorm)
    assert parameter_counts(rms)["block.0"] == attention + feed_forward + biases + 2 * 6


@pytest.mark.parametrize("head", list(SentenceHead))
@pytest.mark.parametrize("layers", [1, 3])
def test_bert_has_the_parameters_of_transformers_model(head: SentenceHead, layers: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = replace(BERT, num_layers=layers, hidden_size=48, vocab_size=300, sentence_head=head)
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=192,
        max_position_embeddings=512,
        type_vocab_size=2,
    )
    both = head is not SentenceHead.none
    theirs = (transformers.BertForPreTraining if both else transformers.BertForMaskedLM)(config)
    assert total_parameters(model) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"token_types": 0}, {"tied_head": False}], ids=str)
def test_every_layer_of_bert_has_the_parameters_that_it_is_built_with(changes: dict[str, Any]) -> None:
    model = replace(BERT, **{"num_layers": 2, "hidden_size": 48, "vocab_size": 320, "vocab_multiple": 1, **changes})
    layers = build_layers(make_with(model), ParallelContext.single(), Kernels(attention=attention))
    built = {
        layer.name: sum(p.numel() for p in layer.factory().parameters()) if owner_of(layers, layer) is layer else 0
        for layer in layers
    }
    assert parameter_counts(model) == built


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": False, "qkv_bias": True, "num_kv_heads": 2, "activation": Activation.swiglu, "norm": Norm.rmsnorm},
        {"bias": True, "qkv_bias": False},
        {"parallel_residual": True, "rotary_fraction": 0.25},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_every_layer_of_gpt_has_the_parameters_that_it_is_built_with(changes: dict[str, Any], tied: bool) -> None:
    small = {"num_layers": 2, "hidden_size": 48, "num_heads": 6, "vocab_size": 320, "vocab_multiple": 1}
    model = replace(GPT2, **{**small, "positions": Positions.rotary, "tied_head": tied, **changes})
    layers = build_layers(make_with(model), ParallelContext.single(), Kernels(attention=attention))
    built = {
        layer.name: sum(p.numel() for p in layer.factory().parameters()) if owner_of(layers, layer) is layer else 0
        for layer in layers
    }
    assert parameter_counts(model) == built


def make_with(model: ModelConfig) -> Config:
    return replace(make(), model=model)


def test_parameter_costs_count_a_tied_head_once() -> None:
    costs = layer_costs(GPT2, Balance.parameters, 1024)
    assert (costs[0], costs[-1]) == (50257 * 768, 0)
    assert sum(costs) == total_parameters(GPT2)
    assert layer_costs(LLAMA, Balance.parameters, 8192)[-1] == 128256 * 4096


@pytest.mark.parametrize("model", [GPT2, LLAMA, BERT], ids=lambda m: m.name)
def test_flop_costs_of_layers_are_a_third_of_training(model: ModelConfig) -> None:
    costs = layer_costs(model, Balance.flops, 1024)
    assert len(costs) == len(parameter_counts(model))
    assert costs[0] == 0
    assert costs[list(parameter_counts(model)).index("head")] == 2 * model.vocab_size * model.hidden_size
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


def test_bert_computes_the_whole_attention_matrix_and_one_sentence_a_sample() -> None:
    causal, full = flops_per_token(BERT, 128)
    sentence = 768 * 768 + 768 + 2 * 768 + 2
    embeddings = (512 + 2) * 768 + 2 * 768
    weights = 110_106_428 - embeddings - sentence + sentence / 128
    assert causal == full == pytest.approx(6 * weights + 12 * 12 * 768 * 128, rel=1e-12)
    pairs = zip(parameter_counts(BERT), layer_costs(BERT, Balance.flops, 128), strict=True)
    assert dict(pairs)["block.0"] == 2 * parameter_counts(BERT)["block.0"] + 4 * 768 * 128
