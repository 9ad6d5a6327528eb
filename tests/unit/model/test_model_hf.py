"""Logits and loss of both flavours against the models of transformers, with our weights copied into theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engine.config import Activation, ModelConfig
from engine.config.derived import head_dim, kv_heads
from engine.dist.context import ParallelContext
from engine.model.gpt import NextTokenLoss
from engine.model.layers import WholeModel
from engine.parallel.logical import logical_of
from tests.helpers.models import GPT2, LLAMA, tokens_of, whole_model

transformers = pytest.importorskip("transformers")

# Between the models only the order of sums differs.
TOLERANCE = 1e-5


def logical_weights(model: WholeModel) -> dict[str, Tensor]:
    """Our weights by logical name, padding cut off."""
    return {logical_of(p).name: logical_of(p).assemble([p.detach()]) for p in model.parameters()}


def gpt2_of(cfg: ModelConfig, ours: dict[str, Tensor]) -> nn.Module:
    """GPT2LMHeadModel; its projections store (in, out), ours (out, in)."""
    config = transformers.GPT2Config(
        vocab_size=cfg.vocab_size,
        n_positions=cfg.max_positions,
        n_embd=cfg.hidden_size,
        n_layer=cfg.num_layers,
        n_head=cfg.num_heads,
        activation_function="gelu_new" if cfg.activation is Activation.gelu_tanh else "gelu",
        layer_norm_epsilon=cfg.norm_eps,
        tie_word_embeddings=cfg.tied_head,
        attn_implementation="eager",
    )
    theirs = {"transformer.wte.weight": ours["embed.tokens.weight"]}
    theirs["transformer.wpe.weight"] = ours["embed.positions.weight"]
    theirs["lm_head.weight"] = ours["embed.tokens.weight" if cfg.tied_head else "head.weight"]
    for kind in ("weight", "bias"):
        theirs[f"transformer.ln_f.{kind}"] = ours[f"final_norm.{kind}"]
        for i in range(cfg.num_layers):
            for name, own in (
                ("ln_1", "attention_norm"),
                ("attn.c_attn", "attention.qkv"),
                ("attn.c_proj", "attention.out"),
                ("ln_2", "mlp_norm"),
                ("mlp.c_fc", "mlp.up"),
                ("mlp.c_proj", "mlp.down"),
            ):
                value = ours[f"block.{i}.{own}.{kind}"]
                theirs[f"transformer.h.{i}.{name}.{kind}"] = value.T if value.dim() == 2 else value
    return filled(transformers.GPT2LMHeadModel(config), theirs)


def llama_of(cfg: ModelConfig, ours: dict[str, Tensor]) -> nn.Module:
    """LlamaForCausalLM; its query, key, value, gate and up projections are apart, ours fused."""
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        max_position_embeddings=cfg.max_positions,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.ffn_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=kv_heads(cfg),
        head_dim=head_dim(cfg),
        rms_norm_eps=cfg.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rotary_base},
        tie_word_embeddings=cfg.tied_head,
        attn_implementation="eager",
    )
    theirs = {"model.embed_tokens.weight": ours["embed.tokens.weight"], "model.norm.weight": ours["final_norm.weight"]}
    theirs["lm_head.weight"] = ours["embed.tokens.weight" if cfg.tied_head else "head.weight"]
    query, kv = cfg.num_heads * head_dim(cfg), kv_heads(cfg) * head_dim(cfg)
    for i in range(cfg.num_layers):
        block, prefix = f"block.{i}", f"model.layers.{i}"
        parts = ours[f"{block}.attention.qkv.weight"].split((query, kv, kv))
        for name, value in zip("qkv", parts, strict=True):
            theirs[f"{prefix}.self_attn.{name}_proj.weight"] = value
        gate, up = ours[f"{block}.mlp.up.weight"].chunk(2)
        theirs[f"{prefix}.mlp.gate_proj.weight"], theirs[f"{prefix}.mlp.up_proj.weight"] = gate, up
        for name, own in (
            ("self_attn.o_proj", "attention.out"),
            ("mlp.down_proj", "mlp.down"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "mlp_norm"),
        ):
            theirs[f"{prefix}.{name}.weight"] = ours[f"{block}.{own}.weight"]
    return filled(transformers.LlamaForCausalLM(config), theirs)


def filled(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """`model` with every one of its weights replaced; none may be left over on either side."""
    model.load_state_dict(weights, strict=True)
    return model.float().eval()


def check(cfg: ModelConfig, theirs: nn.Module, ours: WholeModel) -> None:
    rows = tokens_of(cfg, 3, cfg.max_positions)
    with torch.no_grad():
        expected = theirs(input_ids=rows, labels=rows)
        logits = ours(rows)
        loss = NextTokenLoss(cfg, ParallelContext.single())(ours(rows[:, :-1]), rows[:, 1:])
    assert float(expected.logits.abs().max()) > 1.0, "the comparison is not one of zeros"
    error = (logits[..., : cfg.vocab_size] - expected.logits).abs().max() / expected.logits.abs().max()
    assert float(error) <= TOLERANCE
    assert abs(float(loss - expected.loss)) <= TOLERANCE * float(expected.loss)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", [Activation.gelu_tanh, Activation.gelu])
def test_gpt2(activation: Activation, tied: bool) -> None:
    cfg = replace(GPT2, activation=activation, tied_head=tied, norm_eps=1e-3)
    ours = whole_model(cfg)
    check(cfg, gpt2_of(cfg, logical_weights(ours)), ours)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kv", "width", "base"), [(4, None, 10_000.0), (2, None, 500_000.0), (1, 12, 10_000.0)])
def test_llama(kv: int, width: int | None, base: float, tied: bool) -> None:
    cfg = replace(LLAMA, num_kv_heads=kv, head_dim=width, rotary_base=base, tied_head=tied, norm_eps=1e-3)
    ours = whole_model(cfg)
    check(cfg, llama_of(cfg, logical_weights(ours)), ours)
