"""Weights of transformers' GPT-2 and BERT under Octant's logical names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config.enums import Family
from engine.config.schema import ModelConfig

_KINDS = ("weight", "bias")

_GPT_TABLES = {
    "embed.tokens.weight": "transformer.wte.weight",
    "embed.positions.weight": "transformer.wpe.weight",
}
_GPT_BLOCK = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}

_BERT_TABLES = {
    "embed.tokens.weight": "bert.embeddings.word_embeddings.weight",
    "embed.rest.positions.weight": "bert.embeddings.position_embeddings.weight",
    "embed.rest.types.weight": "bert.embeddings.token_type_embeddings.weight",
    "head.bias.weight": "cls.predictions.bias",
}
_BERT_REST = {
    "embed.rest.norm": "bert.embeddings.LayerNorm",
    "head.transform.dense": "cls.predictions.transform.dense",
    "head.transform.norm": "cls.predictions.transform.LayerNorm",
    "head.transform.pooler": "bert.pooler.dense",
    "head.transform.classes": "cls.seq_relationship",
}
_BERT_BLOCK = {
    "attention_norm": "attention.output.LayerNorm",
    "attention.out": "attention.output.dense",
    "mlp_norm": "output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}


def logical_weights(model: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logical name -> full tensor, from the state of a `GPT2LMHeadModel` or `BertForPreTraining` with tied embeddings.

    GPT-2 stores projections as (in, out), Octant as (out, in). BERT's query, key and value are apart, Octant's joined.
    """
    if model.family is Family.gpt:
        return _of_gpt(model.num_layers, state)
    return _of_bert(model.num_layers, state)


def _of_gpt(num_layers: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {ours: state[theirs] for ours, theirs in _GPT_TABLES.items()}
    for kind in _KINDS:
        found[f"final_norm.{kind}"] = state[f"transformer.ln_f.{kind}"]
        for i in range(num_layers):
            for ours, theirs in _GPT_BLOCK.items():
                value = state[f"transformer.h.{i}.{theirs}.{kind}"]
                found[f"block.{i}.{ours}.{kind}"] = value.T if value.dim() == 2 else value
    return found


def _of_bert(num_layers: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {ours: state[theirs] for ours, theirs in _BERT_TABLES.items()}
    for kind in _KINDS:
        found |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in _BERT_REST.items()}
        for i in range(num_layers):
            layer = f"bert.encoder.layer.{i}"
            for ours, theirs in _BERT_BLOCK.items():
                found[f"block.{i}.{ours}.{kind}"] = state[f"{layer}.{theirs}.{kind}"]
            parts = [state[f"{layer}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"block.{i}.attention.qkv.{kind}"] = torch.cat(parts)
    return found
