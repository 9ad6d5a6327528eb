"""Names and configurations of transformers, both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.config import Activation, ModelConfig, Norm, Positions
from engine.config.enums import SentenceHead
from engine.model.hf import HFFamily, canonical_names, hf_names
from engine.model.hf_config import architecture, hf_config, unlike_theirs
from engine.model.hf_options import DEFAULTS, UnreadableField, model_of, unlike_ours
from engine.model.layers import logical_tensors
from tests.helpers.hf_models import empty_model
from tests.helpers.models import BERT, GPT2, LLAMA, layers_of

VARIANTS = [
    GPT2,
    replace(GPT2, tied_head=False, activation=Activation.gelu, ffn_size=50),
    LLAMA,
    replace(LLAMA, tied_head=True, bias=True, head_dim=12, rotary_base=5e5),
    BERT,
    replace(BERT, tied_head=False, sentence_head=SentenceHead.none, token_types=1),
]


@pytest.mark.parametrize("cfg", VARIANTS)
def test_every_tensor_of_both_sides_is_named_once(cfg: ModelConfig) -> None:
    wanted, names = logical_tensors(layers_of(cfg)), hf_names(cfg)
    assert names.keys() == wanted.keys()
    parts = [(part, wanted[own].shape) for own, several in names.items() for part in several]
    shapes = {name: part.shape(shape) for part, shape in parts for name in (part.name, *part.also)}
    assert len(shapes) == sum(1 + len(part.also) for part, _ in parts), "a name stands for two tensors"
    assert shapes == {name: tuple(value.shape) for name, value in empty_model(cfg).state_dict().items()}
    for own, several in names.items():
        assert [part.start for part in several] == [0, *(part.stop for part in several[:-1])]
        assert several[-1].stop in (None, wanted[own].shape[0])


@pytest.mark.parametrize("cfg", VARIANTS)
def test_configurations_go_both_ways(cfg: ModelConfig) -> None:
    raw = hf_config(cfg).to_dict()
    assert unlike_ours(raw) == []
    found = model_of(raw)
    again = hf_config(found).to_dict()
    # How weights are drawn is no part of a trained model.
    ignored = ("initializer_range",)
    assert {k: v for k, v in again.items() if k not in ignored} == {k: v for k, v in raw.items() if k not in ignored}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_fields_that_are_left_out_mean_what_transformers_means(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    expected = transformers.CONFIG_MAPPING[kind]()
    ours = model_of({"model_type": kind})
    for name, value in DEFAULTS[kind].items():
        # Mistral has no such biases and says so by having no field.
        if value is not None and hasattr(expected, name):
            assert getattr(expected, name) == value, name
    if kind in ("llama", "mistral"):
        assert ours.rotary_base == expected.rope_parameters["rope_theta"]
        assert (ours.num_kv_heads or ours.num_heads) == expected.num_key_value_heads


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt_neox"}, "model_type"),
    ({"model_type": "qwen2"}, "model_type"),
    ({"model_type": "qwen3"}, "model_type"),
    ({"model_type": "phi", "partial_rotary_factor": 0.5}, "model_type"),
    ({"model_type": "something"}, "model_type"),
    ({}, "model_type"),
    ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function"),
    ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights"),
    ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
    ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act"),
    ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}, "rope_parameters"),
    ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters"),
    ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"model_type": "mistral"}, "sliding_window"),
    ({"model_type": "bert", "hidden_act": "gelu_new"}, "hidden_act"),
    ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type"),
    ({"model_type": "bert", "is_decoder": True}, "is_decoder"),
    ({"model_type": "bert", "add_cross_attention": True}, "add_cross_attention"),
]


@pytest.mark.parametrize(("raw", "field"), REFUSED)
def test_what_our_model_cannot_be_is_named(raw: dict[str, Any], field: str) -> None:
    [(name, value, why)] = unlike_ours(raw)
    assert (name, value) == (field, raw.get(field, 4096 if field == "sliding_window" else None))
    assert why


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    raw = {"model_type": "mistral", "max_position_embeddings": 4096}
    assert unlike_ours(raw) == []
    assert unlike_ours({"model_type": "mistral", "sliding_window": None}) == []


@pytest.mark.parametrize("value", [0, -1, "12", None, True, 1.5])
def test_sizes_are_positive_numbers(value: object) -> None:
    with pytest.raises(UnreadableField, match="n_layer=.*: a positive int is needed"):
        model_of({"model_type": "gpt2", "n_layer": value})


@pytest.mark.parametrize(
    ("cfg", "option", "want"),
    [
        (replace(GPT2, norm=Norm.rmsnorm), "model.norm", "layernorm"),
        (replace(GPT2, activation=Activation.swiglu), "model.activation", "gelu_tanh"),
        (replace(GPT2, bias=False), "model.bias", "True"),
        (replace(GPT2, num_kv_heads=2), "model.num_kv_heads", "4"),
        (replace(GPT2, head_dim=12), "model.head_dim", "8"),
        (replace(GPT2, mup_base_width=16), "model.mup_base_width", "None"),
        (replace(GPT2, positions=Positions.rotary, norm=Norm.rmsnorm), "model.activation", "swiglu"),
        (replace(LLAMA, norm=Norm.layernorm), "model.norm", "rmsnorm"),
        (replace(BERT, activation=Activation.gelu_tanh), "model.activation", "gelu"),
        (replace(BERT, token_types=0, sentence_head=SentenceHead.none), "model.token_types", "1 or more"),
    ],
)
def test_what_transformers_cannot_be_is_named(cfg: ModelConfig, option: str, want: str) -> None:
    [(found, _, meant)] = unlike_theirs(cfg)
    assert (found, meant) == (option, want)


def test_architectures() -> None:
    names = [architecture(cfg) for cfg in (GPT2, LLAMA, BERT, replace(BERT, sentence_head=SentenceHead.none))]
    assert names == ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForPreTraining", "BertForMaskedLM"]


def test_names_of_older_files() -> None:
    found = canonical_names(HFFamily.gpt2, ["wte.weight", "h.0.attn.bias", "h.0.attn.c_attn.bias", "lm_head.weight"])
    assert found == {
        "transformer.wte.weight": "wte.weight",
        "transformer.h.0.attn.c_attn.bias": "h.0.attn.c_attn.bias",
        "lm_head.weight": "lm_head.weight",
    }
    old = [
        "bert.embeddings.LayerNorm.gamma",
        "cls.predictions.transform.LayerNorm.beta",
        "bert.embeddings.position_ids",
    ]
    assert canonical_names(HFFamily.bert, old) == {
        "bert.embeddings.LayerNorm.weight": old[0],
        "cls.predictions.transform.LayerNorm.bias": old[1],
    }
