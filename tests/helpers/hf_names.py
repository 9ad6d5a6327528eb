"""The models of transformers with our weights: our logical tensors under their names, in their shapes.

Values and gradients go the same way, because every step is a renaming, a transposition or a cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Activation, ModelConfig, Positions
from engine.config.derived import ffn_size, head_dim, kv_heads
from engine.config.enums import Family
from engine.model.batch import IGNORE, Batch

Tensors = dict[str, Tensor]


def with_weights(cfg: ModelConfig, ours: Mapping[str, Tensor]) -> nn.Module:
    """The model of transformers that `cfg` means, in eval mode, every one of its weights taken from `ours`."""
    model = _empty(cfg)
    model.load_state_dict(renamed(cfg, ours), strict=True)
    return model.float().eval()


def renamed(cfg: ModelConfig, ours: Mapping[str, Tensor]) -> Tensors:
    """Logical tensors by transformers' names; both names of what is tied."""
    if cfg.family is Family.bert:
        return _bert(cfg, ours)
    return _llama(cfg, ours) if cfg.positions is Positions.rotary else _gpt2(cfg, ours)


def relative_errors(cfg: ModelConfig, ours: Mapping[str, Tensor], theirs: nn.Module) -> dict[str, float]:
    """Error of each of our gradients against theirs: norm of the difference over the norm, by logical name.

    Parts of a fused tensor count together: a key's bias alone has a gradient of rounding only, because the softmax
    takes no notice of it.
    """
    names, found = list(ours), renamed(cfg, ours)
    marks = renamed(cfg, {name: torch.full_like(ours[name], i) for i, name in enumerate(names)})
    missed, size = (torch.zeros(len(names), dtype=torch.float64) for _ in range(2))
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None, name
        whose = int(marks[name].flatten()[0])
        missed[whose] += (found[name].double() - parameter.grad.double()).square().sum()
        size[whose] += parameter.grad.double().square().sum()
    return dict(zip(names, (missed / size).sqrt().tolist(), strict=True))


def comparable(cfg: ModelConfig, batch: Batch) -> Batch:
    """`batch` without what transformers' decoders cannot be asked: a target for the last position."""
    if cfg.family is Family.bert:
        return batch
    last_BS = torch.arange(batch.length).expand_as(batch.labels_BS) == batch.length - 1
    return replace(batch, labels_BS=batch.labels_BS.masked_fill(last_BS, IGNORE))


def inputs_of(cfg: ModelConfig, batch: Batch) -> dict[str, Any]:
    """Arguments of a forward pass with losses over `batch` as a whole step; theirs shift the labels of a decoder."""
    if cfg.family is not Family.bert:
        # Position t + 1 of their labels is position t of ours.
        assert (batch.labels_BS[:, -1] == IGNORE).all(), "they have no target for the last position"
        first_B1 = torch.full_like(batch.labels_BS[:, :1], IGNORE)
        return {"input_ids": batch.tokens_BS, "labels": torch.cat([first_B1, batch.labels_BS[:, :-1]], dim=1)}
    found = {"input_ids": batch.tokens_BS, "labels": batch.labels_BS, "token_type_ids": batch.token_types_BS}
    if batch.lengths_B is not None:
        found["attention_mask"] = (torch.arange(batch.length) < batch.lengths_B[:, None]).long()
    if batch.sentence_B is not None:
        found["next_sentence_label"] = batch.sentence_B
    return found


def _empty(cfg: ModelConfig) -> nn.Module:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": cfg.vocab_size,
        "tie_word_embeddings": cfg.tied_head,
        "attn_implementation": "eager",
    }
    activation = "gelu_new" if cfg.activation is Activation.gelu_tanh else "gelu"
    if cfg.family is Family.bert:
        config = transformers.BertConfig(
            hidden_size=cfg.hidden_size,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            intermediate_size=ffn_size(cfg),
            hidden_act=activation,
            max_position_embeddings=cfg.max_positions,
            type_vocab_size=cfg.token_types,
            layer_norm_eps=cfg.norm_eps,
            **common,
        )
        return transformers.BertForPreTraining(config)
    if cfg.positions is Positions.rotary:
        config = transformers.LlamaConfig(
            max_position_embeddings=cfg.max_positions,
            hidden_size=cfg.hidden_size,
            intermediate_size=ffn_size(cfg),
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=kv_heads(cfg),
            head_dim=head_dim(cfg),
            rms_norm_eps=cfg.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rotary_base},
            **common,
        )
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(
        n_positions=cfg.max_positions,
        n_embd=cfg.hidden_size,
        n_layer=cfg.num_layers,
        n_head=cfg.num_heads,
        activation_function=activation,
        layer_norm_epsilon=cfg.norm_eps,
        **common,
    )
    return transformers.GPT2LMHeadModel(config)


def _head(cfg: ModelConfig, ours: Mapping[str, Tensor]) -> Tensor:
    return ours["embed.tokens.weight" if cfg.tied_head else "head.weight"]


def _gpt2(cfg: ModelConfig, ours: Mapping[str, Tensor]) -> Tensors:
    """Its projections store (in, out), ours (out, in)."""
    theirs = {"transformer.wte.weight": ours["embed.tokens.weight"], "lm_head.weight": _head(cfg, ours)}
    theirs["transformer.wpe.weight"] = ours["embed.positions.weight"]
    parts = {
        "ln_1": "attention_norm",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.out",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
    for kind in ("weight", "bias"):
        theirs[f"transformer.ln_f.{kind}"] = ours[f"final_norm.{kind}"]
        for i in range(cfg.num_layers):
            for name, own in parts.items():
                value = ours[f"block.{i}.{own}.{kind}"]
                theirs[f"transformer.h.{i}.{name}.{kind}"] = value.T if value.dim() == 2 else value
    return theirs


def _llama(cfg: ModelConfig, ours: Mapping[str, Tensor]) -> Tensors:
    """Its query, key, value, gate and up projections are apart, ours fused."""
    theirs = {"model.embed_tokens.weight": ours["embed.tokens.weight"], "lm_head.weight": _head(cfg, ours)}
    theirs["model.norm.weight"] = ours["final_norm.weight"]
    parts = {
        "self_attn.o_proj": "attention.out",
        "mlp.down_proj": "mlp.down",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
    }
    query, kv = cfg.num_heads * head_dim(cfg), kv_heads(cfg) * head_dim(cfg)
    for i in range(cfg.num_layers):
        block, prefix = f"block.{i}", f"model.layers.{i}"
        fused = ours[f"{block}.attention.qkv.weight"].split((query, kv, kv))
        for name, value in zip("qkv", fused, strict=True):
            theirs[f"{prefix}.self_attn.{name}_proj.weight"] = value
        gate, up = ours[f"{block}.mlp.up.weight"].chunk(2)
        theirs[f"{prefix}.mlp.gate_proj.weight"], theirs[f"{prefix}.mlp.up_proj.weight"] = gate, up
        for name, own in parts.items():
            theirs[f"{prefix}.{name}.weight"] = ours[f"{block}.{own}.weight"]
    return theirs


def _bert(cfg: ModelConfig, ours: Mapping[str, Tensor]) -> Tensors:
    """Its query, key and value projections are apart, ours fused; it has the bias of the vocabulary under two names."""
    theirs = {
        "bert.embeddings.word_embeddings.weight": ours["embed.tokens.weight"],
        "bert.embeddings.position_embeddings.weight": ours["embed.rest.positions.weight"],
        "bert.embeddings.token_type_embeddings.weight": ours["embed.rest.types.weight"],
        "cls.predictions.decoder.weight": _head(cfg, ours),
        "cls.predictions.decoder.bias": ours["head.bias.weight"],
        "cls.predictions.bias": ours["head.bias.weight"],
    }
    once = {
        "bert.embeddings.LayerNorm": "embed.rest.norm",
        "bert.pooler.dense": "head.transform.pooler",
        "cls.predictions.transform.dense": "head.transform.dense",
        "cls.predictions.transform.LayerNorm": "head.transform.norm",
        "cls.seq_relationship": "head.transform.classes",
    }
    parts = {
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        "output.LayerNorm": "mlp_norm",
    }
    for kind in ("weight", "bias"):
        for name, own in once.items():
            theirs[f"{name}.{kind}"] = ours[f"{own}.{kind}"]
        for i in range(cfg.num_layers):
            layer = f"bert.encoder.layer.{i}"
            for name, value in zip(
                ("query", "key", "value"), ours[f"block.{i}.attention.qkv.{kind}"].chunk(3), strict=True
            ):
                theirs[f"{layer}.attention.self.{name}.{kind}"] = value
            for name, own in parts.items():
                theirs[f"{layer}.{name}.{kind}"] = ours[f"block.{i}.{own}.{kind}"]
    return theirs
