"""Names and configurations of transformers, both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import Activation, ModelConfig, Norm, Positions
from engine.config.enums import SentenceHead
from engine.model.hf import HFFamily, canonical_names, hf_names
from engine.model.hf_config import architecture, hf_config, unlike_theirs
from engine.model.hf_defaults import DEFAULTS
from engine.model.hf_options import UnreadableField, model_of, unlike_ours
from engine.model.hf_stored import Stored
from engine.model.layers import logical_tensors
from tests.helpers.hf_models import empty_model, in_model
from tests.helpers.models import BERT, GPT2, LLAMA, NEOX, QWEN2, layers_of

VARIANTS = [
    GPT2,
    replace(GPT2, tied_head=False, activation=Activation.gelu, ffn_size=50),
    LLAMA,
    replace(LLAMA, tied_head=True, bias=True, head_dim=12, rotary_base=5e5),
    NEOX,
    replace(NEOX, tied_head=True, parallel_residual=False, rotary_fraction=1.0, activation=Activation.gelu_tanh),
    replace(NEOX, rotary_fraction=0.25, rotary_base=5e5, ffn_size=50),
    QWEN2,
    replace(QWEN2, tied_head=True, head_dim=12, num_kv_heads=None, rotary_base=5e5),
    BERT,
    replace(BERT, tied_head=False, sentence_head=SentenceHead.none, token_types=1),
]


@pytest.mark.parametrize("cfg", VARIANTS)
def test_every_tensor_of_both_sides_is_named_once(cfg: ModelConfig) -> None:
    wanted, names = logical_tensors(layers_of(cfg)), hf_names(cfg)
    assert names.keys() == wanted.keys()
    parts = [(part, wanted[own].shape) for own, several in names.items() for part in several]
    shapes = {in_model(name): part.shape(shape) for part, shape in parts for name in (part.name, *part.also)}
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
    # Without a window Qwen2 forgets how long it would be.
    expected = transformers.CONFIG_MAPPING[kind](**({"use_sliding_window": True} if kind == "qwen2" else {}))
    ours = model_of({"model_type": kind})
    for name, value in DEFAULTS[kind].items():
        # Mistral has no such biases and says so by having no field.
        if value is not None and hasattr(expected, name) and name != "use_sliding_window":
            assert getattr(expected, name) == value, name
    assert transformers.Qwen2Config().use_sliding_window is DEFAULTS["qwen2"]["use_sliding_window"]
    if ours.positions is Positions.rotary:
        assert ours.rotary_base == expected.rope_parameters["rope_theta"]
        assert ours.rotary_fraction == expected.rope_parameters.get("partial_rotary_factor", 1.0)
    if kind in ("llama", "mistral", "qwen2"):
        assert (ours.num_kv_heads or ours.num_heads) == expected.num_key_value_heads


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gptj"}, "model_type"),
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
    ({"model_type": "gpt_neox", "hidden_act": "relu"}, "hidden_act"),
    ({"model_type": "gpt_neox", "attention_bias": False}, "attention_bias"),
    ({"model_type": "gpt_neox", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"model_type": "qwen2", "hidden_act": "gelu"}, "hidden_act"),
    ({"model_type": "qwen2", "rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "sliding_window"),
    ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
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


def test_qwen2_has_a_window_only_where_it_is_asked_for() -> None:
    assert unlike_ours({"model_type": "qwen2", "sliding_window": 16, "attention_bias": False}) == []
    below = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 32, "sliding_window": 16}
    assert unlike_ours(below) == []
    [(field, value, _)] = unlike_ours({**below, "max_window_layers": 31})
    assert (field, value) == ("sliding_window", 16)
    assert unlike_ours({**below, "max_window_layers": 31, "layer_types": ["full_attention"] * 32}) == []


def test_rotary_angles_under_older_names() -> None:
    old = model_of({"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 7})
    assert (old.rotary_fraction, old.rotary_base) == (0.5, 7.0)
    new = {"rope_theta": 9.0, "partial_rotary_factor": 1.0, "rope_type": "default"}
    found = model_of({"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 7, "rope_parameters": new})
    assert (found.rotary_fraction, found.rotary_base) == (1.0, 9.0)
    assert model_of({"model_type": "qwen2", "rope_theta": 1e6}).rotary_base == 1e6


@pytest.mark.parametrize(("name", "kind"), [("gelu", "gelu"), ("gelu_fast", "gelu_tanh"), ("gelu_new", "gelu_tanh")])
def test_kinds_of_gelu(name: str, kind: str) -> None:
    for field, family in (("hidden_act", "gpt_neox"), ("activation_function", "gpt2")):
        assert model_of({"model_type": family, field: name}).activation is Activation[kind]


def test_a_fused_projection_is_stored_head_by_head() -> None:
    part = Stored("x", heads=2)
    # Two heads of three rows each: q0 q0 q0 q1 q1 q1 k0 ...
    ours = torch.arange(18)
    theirs = torch.tensor([0, 1, 2, 6, 7, 8, 12, 13, 14, 3, 4, 5, 9, 10, 11, 15, 16, 17])
    for tensor, expected in (
        (ours, theirs),
        (ours[:, None] * 10 + torch.arange(4), theirs[:, None] * 10 + torch.arange(4)),
    ):
        assert torch.equal(part.turned(tensor), expected)
        assert torch.equal(part.turned_back(expected), tensor)
        assert part.shape(tensor.shape) == tuple(expected.shape)


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
        (replace(GPT2, parallel_residual=True), "model.parallel_residual", "False"),
        (replace(GPT2, qkv_bias=False), "model.qkv_bias", "True"),
        (replace(LLAMA, parallel_residual=True), "model.parallel_residual", "False"),
        (replace(LLAMA, rotary_fraction=0.5), "model.rotary_fraction", "1"),
        (replace(LLAMA, bias=True, qkv_bias=False), "model.qkv_bias", "True"),
        (replace(QWEN2, rotary_fraction=0.5), "model.rotary_fraction", "1"),
        (replace(NEOX, bias=False), "model.bias", "True"),
        (replace(NEOX, bias=False, qkv_bias=True), "model.bias", "True"),
        (replace(NEOX, qkv_bias=False), "model.qkv_bias", "True"),
        (replace(NEOX, num_kv_heads=2), "model.num_kv_heads", "4"),
        (replace(NEOX, head_dim=12), "model.head_dim", "8"),
        (replace(BERT, activation=Activation.gelu_tanh), "model.activation", "gelu"),
        (replace(BERT, token_types=0, sentence_head=SentenceHead.none), "model.token_types", "1 or more"),
    ],
)
def test_what_transformers_cannot_be_is_named(cfg: ModelConfig, option: str, want: str) -> None:
    [(found, _, meant)] = unlike_theirs(cfg)
    assert (found, meant) == (option, want)


def test_architectures() -> None:
    models = (GPT2, NEOX, LLAMA, QWEN2, BERT, replace(BERT, sentence_head=SentenceHead.none))
    assert [architecture(cfg) for cfg in models] == [
        *("GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM"),
        *("BertForPreTraining", "BertForMaskedLM"),
    ]


def test_names_of_older_files() -> None:
    found = canonical_names(HFFamily.gpt2, ["wte.weight", "h.0.attn.bias", "h.0.attn.c_attn.bias", "lm_head.weight"])
    assert found == {
        "transformer.wte.weight": "wte.weight",
        "transformer.h.0.attn.c_attn.bias": "h.0.attn.c_attn.bias",
        "lm_head.weight": "lm_head.weight",
    }
    names = ["gpt_neox.embed_in.weight", "gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]
    names += ["gpt_neox.layers.0.attention.rotary_emb.inv_freq", "gpt_neox.layers.0.attention.dense.bias"]
    kept = {name: name for name in (names[0], names[-1])}
    for head in ("embed_out.weight", "lm_head.weight"):
        assert canonical_names(HFFamily.gpt_neox, [*names, head]) == {**kept, "embed_out.weight": head}
    bare = canonical_names(HFFamily.gpt_neox, ["embed_in.weight", "embed_out.weight"])
    assert bare == {"gpt_neox.embed_in.weight": "embed_in.weight", "embed_out.weight": "embed_out.weight"}
    old = [
        "bert.embeddings.LayerNorm.gamma",
        "cls.predictions.transform.LayerNorm.beta",
        "bert.embeddings.position_ids",
    ]
    assert canonical_names(HFFamily.bert, old) == {
        "bert.embeddings.LayerNorm.weight": old[0],
        "cls.predictions.transform.LayerNorm.bias": old[1],
    }
