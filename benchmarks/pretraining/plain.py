"""Pretraining as one writes it with transformers and torch alone, in one process.

Of Octant it reads the configuration and the samples, nothing of its models, losses, schedules or optimizers.
Shapes: B samples of the global batch, S positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining, GPT2Config, GPT2LMHeadModel

from engine.config.derived import warmup_steps
from engine.config.enums import Activation, Family
from engine.config.schema import Config, ModelConfig, OptimConfig
from engine.data import open_data
from engine.model.batch import Batch

_ACTIVATIONS = {Activation.gelu: "gelu", Activation.gelu_tanh: "gelu_new"}
_IGNORED = -100
"""Label that transformers leaves out of its losses."""


@dataclass(slots=True)
class Curves:
    """One value for each step: loss (nats), norm of the gradients before clipping, learning rate."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def build(cfg: Config) -> nn.Module:
    """`GPT2LMHeadModel` or `BertForPreTraining` in fp32, with the initial weights that transformers draws."""
    torch.manual_seed(cfg.train.seed)
    make = _gpt if cfg.model.family is Family.gpt else _bert
    return make(cfg.model).float().train()


def _gpt(model: ModelConfig) -> nn.Module:
    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.max_positions,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.ffn_size,
        activation_function=_ACTIVATIONS[model.activation],
        layer_norm_epsilon=model.norm_eps,
        initializer_range=model.init_std,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # The defaults are entries of GPT-2's own vocabulary.
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    made: nn.Module = GPT2LMHeadModel(config)
    return made


def _bert(model: ModelConfig) -> nn.Module:
    config = BertConfig(
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_positions,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.ffn_size or 4 * model.hidden_size,
        hidden_act=_ACTIVATIONS[model.activation],
        layer_norm_eps=model.norm_eps,
        initializer_range=model.init_std,
        type_vocab_size=model.token_types,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # With a padding entry its row of the table gets no gradient, though the corpus holds it between documents.
        pad_token_id=None,
        attn_implementation="eager",
    )
    made: nn.Module = BertForPreTraining(config)
    return made


def rate_at(optim: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up and half a cosine down to `min_lr_ratio`, at `step` (from 0)."""
    warmup = warmup_steps(optim, steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, (optim.decay_steps or steps) - warmup))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)


def train(model: nn.Module, cfg: Config) -> Curves:
    """`train.steps` steps of AdamW, each on the whole global batch at once, in the dtype of `model`.

    GPT-2's loss alone is fp32 whatever the dtype: transformers casts the logits.
    """
    optim, steps = cfg.optim, cfg.train.steps
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    split, rows = open_data(cfg.data, cfg.model).train, global_batch(cfg)
    inputs = _gpt_inputs if cfg.model.family is Family.gpt else _bert_inputs
    curves = Curves()
    for step in range(steps):
        batch = next(split.micro_batches(step * rows, dp_rank=0, dp=1, micro_batch=rows, accum_steps=1))
        loss: Tensor = model(**inputs(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or math.inf)
        rate = rate_at(optim, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        curves.losses.append(float(loss.detach()))
        curves.norms.append(float(norm))
        curves.rates.append(rate)
    return curves


def global_batch(cfg: Config) -> int:
    """Samples in one optimizer step."""
    return cfg.train.micro_batch * cfg.train.accum_steps * (cfg.parallel.dp or 1)


def _gpt_inputs(batch: Batch) -> dict[str, Any]:
    """transformers shifts labels by itself: the S inputs and S targets are its S + 1 tokens."""
    first, last = batch.tokens_BS[:, :1], batch.labels_BS[:, -1:].clamp(min=0)
    return {
        "input_ids": torch.cat([batch.tokens_BS, last], dim=1),
        "labels": torch.cat([torch.full_like(first, _IGNORED), batch.labels_BS], dim=1),
    }


def _bert_inputs(batch: Batch) -> dict[str, Any]:
    mask = torch.ones_like(batch.tokens_BS)
    if batch.lengths_B is not None:
        mask = (torch.arange(batch.length) < batch.lengths_B[:, None]).long()
    return {
        "input_ids": batch.tokens_BS,
        "attention_mask": mask,
        "token_type_ids": batch.token_types_BS,
        "labels": batch.labels_BS,
        "next_sentence_label": batch.sentence_B,
    }
