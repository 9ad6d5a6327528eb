"""Model configurations: the presets of conf/model/, and two tiny models for tests."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor

from engine.config import Activation, ModelConfig, Norm, Positions
from engine.dist.context import ParallelContext
from engine.model.gpt import build_layers
from engine.model.layers import InitialWeights, LayerDef, WholeModel
from engine_kernels.reference.attention import attention
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
FLAVOURS = [GPT2, LLAMA]


@cache
def preset(name: str) -> ModelConfig:
    """`conf/model/<name>.yaml`, without the cost of composing the other groups."""
    values = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")))
    del values["defaults"]
    return cast(ModelConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values)))


def layers_of(cfg: ModelConfig, ctx: ParallelContext | None = None) -> list[LayerDef]:
    """The layers of `cfg` with the reference attention."""
    return build_layers(cfg, ctx or ParallelContext.single(), attention)


def noisy_weights(seed: int = 7) -> InitialWeights:
    """As `random_weights`, with noise on biases and norms too, so that none of them is without effect."""
    return lambda logical: logical.init_value + replace(logical, init_std=logical.init_std or 0.2).draw(seed)


def whole_model(cfg: ModelConfig, ctx: ParallelContext | None = None) -> WholeModel:
    """The model of `cfg` on one tensor-parallel rank with `noisy_weights`, in eval mode."""
    ctx = ctx or ParallelContext.single()
    model = WholeModel(layers_of(cfg, ctx), noisy_weights(), tp=ctx.tp)
    model.eval()
    return model


def tokens_of(cfg: ModelConfig, batch: int, length: int, *, seed: int = 3) -> Tensor:
    """Random tokens (batch, length), the last of the vocabulary among them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, cfg.vocab_size, (batch, length), generator=generator)
    tokens[0, -1] = cfg.vocab_size - 1
    return tokens
