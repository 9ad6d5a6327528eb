"""The model options that a config.json of transformers means, and what it may say that our model cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config.enums import Activation, Family, Norm, Positions, SentenceHead
from engine.config.schema import ModelConfig
from engine.model.hf_defaults import DEFAULTS, FOREIGN

_GELU = {
    "gelu": Activation.gelu,
    "gelu_new": Activation.gelu_tanh,
    "gelu_fast": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
}


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
    check = {"gpt2": _unlike_gpt2, "gpt_neox": _unlike_neox, "qwen2": _unlike_qwen2, "bert": _unlike_bert}
    return found + [(name, full.get(name), why) for name, why in check.get(kind, _unlike_llama)(full)]


def _unlike_gpt2(full: Mapping[str, Any]) -> list[tuple[str, str]]:
    table = [
        (full["activation_function"] not in _GELU, "activation_function", f"known here: {', '.join(_GELU)}"),
        (not full["scale_attn_weights"], "scale_attn_weights", "attention is scaled here"),
        (full["scale_attn_by_inverse_layer_idx"], "scale_attn_by_inverse_layer_idx", "every layer scales alike here"),
        (full["add_cross_attention"], "add_cross_attention", "there is no cross attention here"),
    ]
    return [(name, why) for broken, name, why in table if broken]


def _unlike_neox(full: Mapping[str, Any]) -> list[tuple[str, str]]:
    name, values = _rope(full)
    table = [
        (full["hidden_act"] not in _GELU, "hidden_act", f"known here: {', '.join(_GELU)}"),
        (_is_scaled(values), name, "rotary angles are not scaled here"),
        (not full["attention_bias"], "attention_bias", "both output projections of a block have biases here, or none"),
    ]
    return [(name, why) for broken, name, why in table if broken]


def _unlike_llama(full: Mapping[str, Any]) -> list[tuple[str, str]]:
    window = full.get("sliding_window")
    rope, values = _rope(full)
    scaled = _is_scaled(values)
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
        (turned != 1.0, rope, "rotary angles turn whole heads of such models here"),
        (
            full.get("partial_rotary_factor", 1.0) != 1.0,
            "partial_rotary_factor",
            "rotary angles turn whole heads of such models here",
        ),
        (biases[0] and not biases[1], "attention_bias", "mlp_bias is false, and model.bias is one for all layers"),
        (biases[1] and not biases[0], "mlp_bias", "attention_bias is false, and model.bias is one for all layers"),
    ]
    return [(name, why) for broken, name, why in table if broken]


def _unlike_qwen2(full: Mapping[str, Any]) -> list[tuple[str, str]]:
    """As Llama, but which layers have biases is no option, and only the upper ones may have a window."""
    kinds = full["layer_types"]
    slides = kinds is None and full["use_sliding_window"] and full["max_window_layers"] < full["num_hidden_layers"]
    window = full["sliding_window"] if slides else None
    found = _unlike_llama({**full, "sliding_window": window, "attention_bias": False, "mlp_bias": False})
    if any(kind != "full_attention" for kind in kinds or ()):
        found.append(("layer_types", "attention sees the whole sequence here"))
    return found


def _unlike_bert(full: Mapping[str, Any]) -> list[tuple[str, str]]:
    kind = full.get("position_embedding_type", "absolute")
    table = [
        (full["hidden_act"] != "gelu", "hidden_act", "the head's activation is the exact GELU here"),
        (kind != "absolute", "position_embedding_type", "positions are a learned table here"),
        (full["is_decoder"], "is_decoder", "every position sees all others here"),
        (full["add_cross_attention"], "add_cross_attention", "there is no cross attention here"),
    ]
    return [(name, why) for broken, name, why in table if broken]


def _rope(full: Mapping[str, Any]) -> tuple[str, Any]:
    """The field about rotary angles, which older versions call otherwise, and what it holds."""
    name = "rope_parameters" if full.get("rope_parameters") else "rope_scaling"
    return name, full.get(name) or {}


def _is_scaled(rope: Any) -> bool:
    return not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default"


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
    names = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "ffn_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
    }
    if kind == "gpt2":
        names |= {"num_layers": "n_layer", "hidden_size": "n_embd", "num_heads": "n_head", "ffn_size": "n_inner"}
        names["max_positions"] = "n_positions"
        if full["n_inner"] is None:
            del names["ffn_size"]
    sizes = {own: _number(full, name) for own, name in names.items()}
    rest = {"gpt2": _gpt2_options, "gpt_neox": _neox_options, "bert": _bert_options}.get(kind, _llama_options)(full)
    return ModelConfig(name=kind, **sizes, **rest, tied_head=bool(full["tie_word_embeddings"]))


def _gpt2_options(full: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "norm_eps": _number(full, "layer_norm_epsilon", float),
        "activation": _GELU[full["activation_function"]],
    }


def _bert_options(full: Mapping[str, Any]) -> dict[str, Any]:
    both = "BertForPreTraining" in (full.get("architectures") or ())
    return {
        "family": Family.bert,
        "norm_eps": _number(full, "layer_norm_eps", float),
        "activation": _GELU[full["hidden_act"]],
        "token_types": _number(full, "type_vocab_size"),
        "sentence_head": SentenceHead.next_sentence if both else SentenceHead.none,
    }


def _neox_options(full: Mapping[str, Any]) -> dict[str, Any]:
    rope = {"rope_theta": full["rotary_emb_base"], "partial_rotary_factor": full["rotary_pct"], **_rope(full)[1]}
    return {
        "positions": Positions.rotary,
        "rotary_base": _number(rope, "rope_theta", float),
        "rotary_fraction": _number(rope, "partial_rotary_factor", float),
        "parallel_residual": bool(full["use_parallel_residual"]),
        "norm_eps": _number(full, "layer_norm_eps", float),
        "activation": _GELU[full["hidden_act"]],
    }


def _llama_options(full: Mapping[str, Any]) -> dict[str, Any]:
    """Of Llama and Mistral, and of Qwen2, whose projections to queries, keys and values alone have biases."""
    rope = {"rope_theta": full.get("rope_theta", 10000.0), **_rope(full)[1]}
    qwen2 = full["model_type"] == "qwen2"
    return {
        "num_kv_heads": None if full["num_key_value_heads"] is None else _number(full, "num_key_value_heads"),
        "head_dim": None if full["head_dim"] is None else _number(full, "head_dim"),
        "positions": Positions.rotary,
        "rotary_base": _number(rope, "rope_theta", float),
        "norm": Norm.rmsnorm,
        "norm_eps": _number(full, "rms_norm_eps", float),
        "activation": Activation.swiglu,
        "bias": False if qwen2 else bool(full["attention_bias"]),
        "qkv_bias": True if qwen2 else None,
    }
