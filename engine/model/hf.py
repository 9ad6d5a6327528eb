"""Our logical tensors under the names and in the shapes of transformers: GPT-2, GPT-NeoX, Llama, Qwen2 and BERT.

Every step is a renaming, a transposition, an order or a cut of rows, so values and gradients go both ways unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import accumulate, pairwise

from engine.config.derived import ffn_size, head_dim, kv_heads, qkv_bias
from engine.config.enums import Activation, Family, Norm, Positions, SentenceHead
from engine.config.schema import ModelConfig
from engine.model.hf_stored import HFNames, Stored


class HFFamily(StrEnum):
    """`model_type` of the configurations that transformers has for our models."""

    gpt2 = "gpt2"
    gpt_neox = "gpt_neox"
    llama = "llama"
    qwen2 = "qwen2"
    bert = "bert"


def hf_family(cfg: ModelConfig) -> HFFamily:
    """The family of transformers that `cfg` is nearest to."""
    if cfg.family is Family.bert:
        return HFFamily.bert
    if cfg.positions is Positions.learned:
        return HFFamily.gpt2
    if cfg.norm is Norm.layernorm and cfg.activation is not Activation.swiglu:
        return HFFamily.gpt_neox
    return HFFamily.qwen2 if qkv_bias(cfg) and not cfg.bias else HFFamily.llama


def hf_names(cfg: ModelConfig) -> HFNames:
    """Where transformers keeps each logical tensor of `cfg`, which is one that `hf_config` accepts."""
    families = {HFFamily.gpt2: _gpt2, HFFamily.gpt_neox: _neox, HFFamily.bert: _bert}
    return families.get(hf_family(cfg), _llama)(cfg)


_PREFIX = {
    HFFamily.gpt2: "transformer.",
    HFFamily.gpt_neox: "gpt_neox.",
    HFFamily.llama: "model.",
    HFFamily.qwen2: "model.",
    HFFamily.bert: "bert.",
}
_HEADS = ("lm_head.", "embed_out.", "cls.")
_BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|embeddings\.position_ids$")


def canonical_names(family: HFFamily, names: Iterable[str]) -> dict[str, str]:
    """Names in a file by the names that `hf_names` has: older files lack the prefix, and say gamma and beta.

    The head of GPT-NeoX is embed_out in files; the class of transformers calls it lm_head, and so may a file. Constants
    that old versions stored (causal masks, rotary frequencies, position numbers) are left out.
    """
    given = [name for name in names if not _BUFFERS.search(name)]
    bare = not any(name.startswith(_PREFIX[family]) for name in given)
    found = {}
    for name in given:
        key = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: {"gamma": "weight", "beta": "bias"}[m[1]], name)
        key = re.sub(r"^lm_head\.", "embed_out.", key) if family is HFFamily.gpt_neox else key
        found[_PREFIX[family] + key if bare and not key.startswith(_HEADS) else key] = name
    return found


def _fused(names: Sequence[str], sizes: Sequence[int]) -> tuple[Stored, ...]:
    borders = accumulate(sizes, initial=0)
    return tuple(Stored(name, start, stop) for name, (start, stop) in zip(names, pairwise(borders), strict=True))


def _token_tables(cfg: ModelConfig, table: str, head: str) -> HFNames:
    """The token table and the output projection."""
    if cfg.tied_head:
        return {"embed.tokens.weight": (Stored(table, also=(head,)),)}
    return {"embed.tokens.weight": (Stored(table),), "head.weight": (Stored(head),)}


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _gpt2(cfg: ModelConfig) -> HFNames:
    """Its projections store (in, out)."""
    found = _token_tables(cfg, "transformer.wte.weight", "lm_head.weight")
    found["embed.positions.weight"] = (Stored("transformer.wpe.weight"),)
    norms = {"ln_1": "attention_norm", "ln_2": "mlp_norm"}
    matrices = {
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.out",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
    for kind in _kinds(True):
        found[f"final_norm.{kind}"] = (Stored(f"transformer.ln_f.{kind}"),)
        for i in range(cfg.num_layers):
            for name, own in (norms | matrices).items():
                turn = name in matrices and kind == "weight"
                found[f"block.{i}.{own}.{kind}"] = (Stored(f"transformer.h.{i}.{name}.{kind}", transposed=turn),)
    return found


def _neox(cfg: ModelConfig) -> HFNames:
    """Its query, key and value projections are fused head by head."""
    found = _token_tables(cfg, "gpt_neox.embed_in.weight", "embed_out.weight")
    parts = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "attention.dense": "attention.out",
        "mlp.dense_h_to_4h": "mlp.up",
        "mlp.dense_4h_to_h": "mlp.down",
    }
    for kind in _kinds(True):
        found[f"final_norm.{kind}"] = (Stored(f"gpt_neox.final_layer_norm.{kind}"),)
        for i in range(cfg.num_layers):
            block, layer = f"block.{i}", f"gpt_neox.layers.{i}"
            fused = Stored(f"{layer}.attention.query_key_value.{kind}", heads=cfg.num_heads)
            found[f"{block}.attention.qkv.{kind}"] = (fused,)
            for name, own in parts.items():
                found[f"{block}.{own}.{kind}"] = (Stored(f"{layer}.{name}.{kind}"),)
    return found


def _llama(cfg: ModelConfig) -> HFNames:
    """Its query, key, value, gate and up projections are apart, ours fused; those of Qwen2 too."""
    found = _token_tables(cfg, "model.embed_tokens.weight", "lm_head.weight")
    found["final_norm.weight"] = (Stored("model.norm.weight"),)
    query, kv, ffn = cfg.num_heads * head_dim(cfg), kv_heads(cfg) * head_dim(cfg), ffn_size(cfg)
    for i in range(cfg.num_layers):
        block, layer = f"block.{i}", f"model.layers.{i}"
        found[f"{block}.attention_norm.weight"] = (Stored(f"{layer}.input_layernorm.weight"),)
        found[f"{block}.mlp_norm.weight"] = (Stored(f"{layer}.post_attention_layernorm.weight"),)
        for kind in _kinds(qkv_bias(cfg)):
            qkv = [f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            found[f"{block}.attention.qkv.{kind}"] = _fused(qkv, (query, kv, kv))
        for kind in _kinds(cfg.bias):
            found[f"{block}.attention.out.{kind}"] = (Stored(f"{layer}.self_attn.o_proj.{kind}"),)
            gates = [f"{layer}.mlp.{part}_proj.{kind}" for part in ("gate", "up")]
            found[f"{block}.mlp.up.{kind}"] = _fused(gates, (ffn, ffn))
            found[f"{block}.mlp.down.{kind}"] = (Stored(f"{layer}.mlp.down_proj.{kind}"),)
    return found


BERT_HEADS = ("bert.pooler.", "cls.seq_relationship.")
"""Names of the sentence head, which a file may have and a run may leave."""


def _bert(cfg: ModelConfig) -> HFNames:
    """Its query, key and value projections are apart, ours fused; it has the bias of the vocabulary under two names."""
    found = _token_tables(cfg, "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    bias = ("cls.predictions.bias", "cls.predictions.decoder.bias")
    # The decoder adds the one of its own, which is the other only where weights are tied.
    first, second = bias if cfg.tied_head else bias[::-1]
    found["head.bias.weight"] = (Stored(first, also=(second,)),)
    found["embed.rest.positions.weight"] = (Stored("bert.embeddings.position_embeddings.weight"),)
    found["embed.rest.types.weight"] = (Stored("bert.embeddings.token_type_embeddings.weight"),)
    once = {
        "bert.embeddings.LayerNorm": "embed.rest.norm",
        "cls.predictions.transform.dense": "head.transform.dense",
        "cls.predictions.transform.LayerNorm": "head.transform.norm",
    }
    if cfg.sentence_head is not SentenceHead.none:
        once |= {"bert.pooler.dense": "head.transform.pooler", "cls.seq_relationship": "head.transform.classes"}
    parts = {
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "mlp_norm",
    }
    width = cfg.hidden_size
    for kind in _kinds(True):
        for name, own in once.items():
            found[f"{own}.{kind}"] = (Stored(f"{name}.{kind}"),)
        for i in range(cfg.num_layers):
            block, layer = f"block.{i}", f"bert.encoder.layer.{i}"
            qkv = [f"{layer}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            found[f"{block}.attention.qkv.{kind}"] = _fused(qkv, (width, width, width))
            for name, own in parts.items():
                found[f"{block}.{own}.{kind}"] = (Stored(f"{layer}.{name}.{kind}"),)
    return found
