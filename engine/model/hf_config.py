"""The configuration of transformers that our model options mean, and which of them it cannot be."""

from __future__ import annotations

from typing import Any

from engine.config.derived import ffn_size, head_dim, kv_heads
from engine.config.enums import Activation, Family, Norm, SentenceHead
from engine.config.schema import ModelConfig
from engine.model.hf import HFFamily, hf_family

_GELU = {Activation.gelu: "gelu", Activation.gelu_tanh: "gelu_new"}


def unlike_theirs(cfg: ModelConfig) -> list[tuple[str, Any, str]]:
    """Options of `cfg` that the nearest family of transformers cannot be: option, value, and what it would have."""
    family = hf_family(cfg)
    # Only Llama may have no biases at all; Qwen2 has these and no others.
    biased = cfg.bias if family is HFFamily.llama else True
    needed: dict[str, tuple[Any, Any]] = {
        "mup_base_width": (cfg.mup_base_width, None),
        "qkv_bias": (biased if cfg.qkv_bias is None else cfg.qkv_bias, biased),
    }
    if family is not HFFamily.gpt_neox:
        needed["parallel_residual"] = (cfg.parallel_residual, False)
    if family in (HFFamily.llama, HFFamily.qwen2):
        needed |= {
            "norm": (cfg.norm, Norm.rmsnorm),
            "activation": (cfg.activation, Activation.swiglu),
            "rotary_fraction": (cfg.rotary_fraction, 1.0),
        }
    else:
        gelu = cfg.activation if cfg.activation is not Activation.swiglu else Activation.gelu_tanh
        needed |= {
            "norm": (cfg.norm, Norm.layernorm),
            "activation": (cfg.activation, Activation.gelu if family is HFFamily.bert else gelu),
            "bias": (cfg.bias, True),
            "num_kv_heads": (kv_heads(cfg), cfg.num_heads),
            "head_dim": (head_dim(cfg), cfg.hidden_size / cfg.num_heads),
        }
    found = [
        (f"model.{name}", getattr(cfg, name), f"{want:g}" if isinstance(want, float) else f"{want}")
        for name, (have, want) in needed.items()
        if have != want
    ]
    if family is HFFamily.bert and cfg.token_types < 1:
        found.append(("model.token_types", cfg.token_types, "1 or more"))
    return found


def architecture(cfg: ModelConfig) -> str:
    """The class of transformers that has all of the model's heads."""
    if cfg.family is Family.bert:
        return "BertForMaskedLM" if cfg.sentence_head is SentenceHead.none else "BertForPreTraining"
    return {
        HFFamily.gpt2: "GPT2LMHeadModel",
        HFFamily.gpt_neox: "GPTNeoXForCausalLM",
        HFFamily.llama: "LlamaForCausalLM",
        HFFamily.qwen2: "Qwen2ForCausalLM",
    }[hf_family(cfg)]


def hf_config(cfg: ModelConfig, end: int | None = None) -> Any:
    """The configuration object of transformers that `cfg` means; `unlike_theirs` found nothing.

    Args:
        end: token that ends, begins and pads a document; None: unknown.
    """
    import transformers

    common: dict[str, Any] = {
        "architectures": [architecture(cfg)],
        "vocab_size": cfg.vocab_size,
        "tie_word_embeddings": cfg.tied_head,
        "initializer_range": cfg.init_std,
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    family = hf_family(cfg)
    if family is HFFamily.gpt2:
        return transformers.GPT2Config(**common, **_gpt2(cfg))
    common |= {
        "max_position_embeddings": cfg.max_positions,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": ffn_size(cfg),
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
    }
    if family is HFFamily.bert:
        return transformers.BertConfig(
            hidden_act="gelu",
            type_vocab_size=cfg.token_types,
            layer_norm_eps=cfg.norm_eps,
            hidden_dropout_prob=cfg.dropout,
            attention_probs_dropout_prob=cfg.attention_dropout,
            **common,
        )
    common["attention_dropout"] = cfg.attention_dropout
    rope = {"rope_type": "default", "rope_theta": cfg.rotary_base}
    if family is HFFamily.gpt_neox:
        return transformers.GPTNeoXConfig(
            hidden_act=_GELU[cfg.activation],
            layer_norm_eps=cfg.norm_eps,
            rope_parameters={**rope, "partial_rotary_factor": cfg.rotary_fraction},
            use_parallel_residual=cfg.parallel_residual,
            attention_bias=True,
            hidden_dropout=cfg.dropout,
            **common,
        )
    common |= {"num_key_value_heads": kv_heads(cfg), "head_dim": head_dim(cfg), "rms_norm_eps": cfg.norm_eps}
    if family is HFFamily.qwen2:
        return transformers.Qwen2Config(rope_parameters=rope, use_sliding_window=False, **common)
    return transformers.LlamaConfig(rope_parameters=rope, attention_bias=cfg.bias, mlp_bias=cfg.bias, **common)


def _gpt2(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": cfg.max_positions,
        "n_embd": cfg.hidden_size,
        "n_layer": cfg.num_layers,
        "n_head": cfg.num_heads,
        "n_inner": ffn_size(cfg),
        "activation_function": _GELU[cfg.activation],
        "layer_norm_epsilon": cfg.norm_eps,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.attention_dropout,
    }
