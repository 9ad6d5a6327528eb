"""The model options that a config.json of transformers means, and what it may say that our model cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from engine.config.enums import Activation, Family, Norm, Positions, SentenceHead
from engine.config.schema import ModelConfig

DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    "bert": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
}
"""What transformers takes for fields that a config.json leaves out."""
DEFAULTS["mistral"] = {
    **DEFAULTS["llama"],
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}

FOREIGN = {
    "gpt_neox": "attention and feed-forward are parallel there, one after the other here",
    "gptj": "attention and feed-forward are parallel there, one after the other here",
    "phi": "attention and feed-forward are parallel there, and rotary angles turn a part of each head",
    "qwen2": "query, key and value projections have biases there and the others none; model.bias is one for all",
    "qwen3": "queries and keys are normalised there",
    "gemma": "embeddings are scaled and norms add one to their weights there",
    "gemma2": "logits are capped and norms stand on both sides of a sublayer there",
    "gpt_neo": "attention is local in every other layer there",
    "mixtral": "feed-forwards are mixtures of experts there",
    "roberta": "positions count from the padding token there",
    "distilbert": "segment embeddings and the sentence head are missing there",
}
"""Architectures that are asked for, and why they are none of ours."""
_GELU = {"gelu": Activation.gelu, "gelu_new": Activation.gelu_tanh, "gelu_pytorch_tanh": Activation.gelu_tanh}


class UnreadableField(ValueError):
    """A field of a config.json has no meaning."""


def unlike_ours(raw: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Fields of a config.json that our model cannot be: name, value, and why; empty when it is one of ours."""
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        why = FOREIGN.get(str(kind), f"the architectures read here are {', '.join(sorted(DEFAULTS))}")
        return [("model_type", kind, why)]
    full = {**DEFAULTS[kind], **raw}
    found = []
    if raw.get("quantization_config") is not None:
        found.append(("quantization_config", raw["quantization_config"], "quantised weights are no tensors of numbers"))
    check = {"gpt2": _unlike_gpt2, "bert": _unlike_bert}.get(kind, _unlike_llama)
    return found + [(name, full.get(name), why) for name, why in check(full)]


def _unlike_gpt2(full: Mapping[str, Any]) -> list[tuple[str, str]]:
    table = [
        (full["activation_function"] not in _GELU, "activation_function", f"known here: {', '.join(_GELU)}"),
        (not full["scale_attn_weights"], "scale_attn_weights", "attention is scaled here"),
        (full["scale_attn_by_inverse_layer_idx"], "scale_attn_by_inverse_layer_idx", "every layer scales alike here"),
        (full["add_cross_attention"], "add_cross_attention", "there is no cross attention here"),
    ]
    return [(name, why) for broken, name, why in table if broken]


def _unlike_llama(full: Mapping[str, Any]) -> list[tuple[str, str]]:
    window = full.get("sliding_window")
    rope = "rope_parameters" if full.get("rope_parameters") else "rope_scaling"
    values = full.get(rope) or {}
    scaled = not isinstance(values, Mapping) or values.get("rope_type", values.get("type", "default")) != "default"
    turned = 1.0 if scaled else values.get("partial_rotary_factor", 1.0)
    biases = full["attention_bias"], full["mlp_bias"]
    table = [
        (full["hidden_act"] not in ("silu", "swish"), "hidden_act", "gated feed-forwards are SwiGLU here (silu)"),
        (
            window is not None and window < full["max_position_embeddings"],
            "sliding_window",
            "attention sees the whole sequence here",
        ),
        (scaled, rope, "rotary angles are not scaled here"),
        (turned != 1.0, rope, "rotary angles turn whole heads here"),
        (full.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor", "rotary angles turn whole heads here"),
        (biases[0] and not biases[1], "attention_bias", "mlp_bias is false, and model.bias is one for all layers"),
        (biases[1] and not biases[0], "mlp_bias", "attention_bias is false, and model.bias is one for all layers"),
    ]
    return [(name, why) for broken, name, why in table if broken]


def _unlike_bert(full: Mapping[str, Any]) -> list[tuple[str, str]]:
    kind = full.get("position_embedding_type", "absolute")
    table = [
        (full["hidden_act"] != "gelu", "hidden_act", "the head's activation is the exact GELU here"),
        (kind != "absolute", "position_embedding_type", "positions are a learned table here"),
        (full["is_decoder"], "is_decoder", "every position sees all others here"),
        (full["add_cross_attention"], "add_cross_attention", "there is no cross attention here"),
    ]
    return [(name, why) for broken, name, why in table if broken]


def _number(full: Mapping[str, Any], name: str, of: type[int] | type[float] = int) -> Any:
    value = full[name]
    if isinstance(value, bool) or not isinstance(value, (int, of)) or not value > 0:
        raise UnreadableField(f"{name}={value!r}: a positive {of.__name__} is needed")
    return of(value)


def model_of(raw: Mapping[str, Any]) -> ModelConfig:
    """The model options that a config.json means, for which `unlike_ours` found nothing.

    The sentence head of BERT follows `architectures`. Raises UnreadableField: a size that is no positive number.
    """
    kind = str(raw["model_type"])
    full = {**DEFAULTS[kind], **raw}

    number = partial(_number, full)
    if kind == "gpt2":
        return ModelConfig(
            name=kind,
            num_layers=number("n_layer"),
            hidden_size=number("n_embd"),
            num_heads=number("n_head"),
            ffn_size=None if full["n_inner"] is None else number("n_inner"),
            vocab_size=number("vocab_size"),
            max_positions=number("n_positions"),
            norm_eps=number("layer_norm_epsilon", float),
            activation=_GELU[full["activation_function"]],
            tied_head=bool(full["tie_word_embeddings"]),
        )
    common: dict[str, Any] = {
        "name": kind,
        "num_layers": number("num_hidden_layers"),
        "hidden_size": number("hidden_size"),
        "num_heads": number("num_attention_heads"),
        "ffn_size": number("intermediate_size"),
        "vocab_size": number("vocab_size"),
        "max_positions": number("max_position_embeddings"),
        "tied_head": bool(full["tie_word_embeddings"]),
    }
    if kind == "bert":
        return ModelConfig(
            **common,
            family=Family.bert,
            norm_eps=number("layer_norm_eps", float),
            activation=_GELU[full["hidden_act"]],
            token_types=number("type_vocab_size"),
            sentence_head=SentenceHead.next_sentence
            if "BertForPreTraining" in (full.get("architectures") or ())
            else SentenceHead.none,
        )
    rope = full.get("rope_parameters") or full.get("rope_scaling") or {}
    full["rope_theta"] = rope.get("rope_theta", full.get("rope_theta", 10000.0))
    return ModelConfig(
        **common,
        num_kv_heads=None if full["num_key_value_heads"] is None else number("num_key_value_heads"),
        head_dim=None if full["head_dim"] is None else number("head_dim"),
        positions=Positions.rotary,
        rotary_base=number("rope_theta", float),
        norm=Norm.rmsnorm,
        norm_eps=number("rms_norm_eps", float),
        activation=Activation.swiglu,
        bias=bool(full["attention_bias"]),
    )
