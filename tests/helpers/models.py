"""Model configurations: the presets of conf/model/, and tiny models for tests with what they eat."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor

from engine.config import Activation, Config, ModelConfig, Norm, Positions
from engine.config.enums import Family, SentenceHead
from engine.dist.context import ParallelContext
from engine.model.batch import IGNORE, Batch
from engine.model.build import build_layers, build_loss
from engine.model.feed import Feed
from engine.model.layers import InitialWeights, LayerDef, Stack, build_stacks
from engine.parallel.logical import logical_of
from engine.runtime.steps import make_feeds
from engine_kernels.ops import AttentionFn, Kernels
from engine_kernels.reference.attention import attention as reference
from tests.helpers.configs import make
from tests.helpers.repo import ROOT

PRESETS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))

# Initial weights far larger than in training, so that every part of the model shows in the logits.
GPT2 = ModelConfig(
    name="gpt2",
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    vocab_size=101,
    max_positions=24,
    init_std=0.3,
)
LLAMA = replace(
    GPT2,
    name="llama",
    num_kv_heads=2,
    ffn_size=44,
    positions=Positions.rotary,
    norm=Norm.rmsnorm,
    activation=Activation.swiglu,
    bias=False,
    tied_head=False,
)
NEOX = replace(
    GPT2,
    name="neox",
    positions=Positions.rotary,
    rotary_fraction=0.5,
    parallel_residual=True,
    activation=Activation.gelu,
    tied_head=False,
)
QWEN2 = replace(LLAMA, name="qwen2", qkv_bias=True)
BERT = replace(
    GPT2,
    name="bert",
    family=Family.bert,
    activation=Activation.gelu,
    norm_eps=1e-12,
    token_types=2,
    sentence_head=SentenceHead.next_sentence,
)
FLAVOURS = [GPT2, LLAMA, NEOX, QWEN2]
MODELS = [*FLAVOURS, BERT]


@cache
def preset(name: str) -> ModelConfig:
    """`conf/model/<name>.yaml`, without the cost of composing the other groups."""
    values = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")))
    del values["defaults"]
    return cast(ModelConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values)))


def config_of(model: ModelConfig, **changes: Any) -> Config:
    """A configuration around `model`, with `section__option=value` changed."""
    cfg = make(data__seq_len=model.max_positions, **changes)
    cfg.model = model
    return cfg


def layers_of(
    model: ModelConfig,
    ctx: ParallelContext | None = None,
    attention: AttentionFn = reference,
    kernels: Kernels | None = None,
    **changes: Any,
) -> list[LayerDef]:
    """The layers of `model` in a configuration with `changes`, of `kernels` or with `attention` and torch."""
    kernels = kernels or Kernels(attention=attention)
    return build_layers(config_of(model, **changes), ctx or ParallelContext.single(), kernels)


def noisy_weights(seed: int = 7) -> InitialWeights:
    """As `random_weights`, with noise on biases and norms too, so that none of them is without effect."""
    return lambda logical: logical.init_value + replace(logical, init_std=logical.init_std or 0.2).draw(seed)


def whole_model(model: ModelConfig, ctx: ParallelContext | None = None, **changes: Any) -> Stack:
    """The model on one tensor-parallel rank with `noisy_weights`, in eval mode."""
    ctx = ctx or ParallelContext.single()
    layers = layers_of(model, ctx, **changes)
    (stack,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=ctx.tp)
    return cast(Stack, stack.eval())


def tokens_of(cfg: ModelConfig, batch: int, length: int, *, seed: int = 3) -> Tensor:
    """Random tokens (batch, length), the last of the vocabulary among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, cfg.vocab_size, (batch, length), generator=generator)
    tokens[0, -1] = cfg.vocab_size - 1
    return tokens


def batch_of(cfg: ModelConfig, rows: int = 2, length: int = 8, *, first: int = 0, padded: bool = False) -> Batch:
    """A micro-batch as the data makes it for `cfg`: samples from `first` on; `padded` rows get shorter and shorter."""
    generator = torch.Generator().manual_seed(first)
    tokens_BS = tokens_of(cfg, rows, length + 1, seed=first)
    lengths = [max(2, length - 2 * row) if padded else length for row in range(rows)]
    real_BS = torch.arange(length) < torch.tensor(lengths)[:, None]
    if cfg.family is Family.gpt:
        labels_BS = tokens_BS[:, 1:].masked_fill(~real_BS, IGNORE)
        return Batch(tokens_BS=tokens_BS[:, :-1], labels_BS=labels_BS, samples_B=torch.arange(first, first + rows))
    chosen_BS = real_BS & (torch.rand(rows, length, generator=generator) < 0.4)
    chosen_BS[:, 0] = True
    types_BS = (torch.arange(length).expand(rows, length) >= length // 3).long()
    return Batch(
        tokens_BS=tokens_BS[:, 1:],
        labels_BS=tokens_BS[:, :-1].masked_fill(~chosen_BS, IGNORE),
        samples_B=torch.arange(first, first + rows),
        lengths_B=torch.tensor(lengths) if padded else None,
        token_types_BS=types_BS if cfg.token_types else None,
        sentence_B=torch.arange(first, first + rows) % 2 if cfg.sentence_head is not SentenceHead.none else None,
    )


def feed_of(model: ModelConfig, batch: Batch, ctx: ParallelContext | None = None, **changes: Any) -> Feed:
    """`batch` as the only micro-batch of a step, as a rank reads it."""
    return make_feeds([batch], config_of(model, **changes), ctx or ParallelContext.single())[0]


def logits_of(stack: Stack, feed: Feed) -> Tensor:
    """Logits of a whole model, without the sentence head's classes."""
    out = stack(None, feed)
    return out[0] if isinstance(out, tuple) else out


def loss_and_gradients(
    model: ModelConfig, stack: Stack, batch: Batch, ctx: ParallelContext | None = None, **changes: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of `batch` as a whole step, and this rank's slice of each gradient by logical name."""
    ctx = ctx or ParallelContext.single()
    feed = feed_of(model, batch, ctx, **changes)
    loss = build_loss(config_of(model, **changes), ctx)(stack(None, feed), feed)
    loss.backward()
    return loss.detach(), {logical_of(p).name: p.grad for p in stack.parameters() if p.grad is not None}
