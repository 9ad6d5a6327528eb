"""A loss that is fused with the output projection: the loss and the gradients of logits in full."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.dist.context import SINGLE, ParallelContext
from engine.model.build import build_loss
from engine.model.layers import Stack, build_stacks
from engine.parallel.embedding import VocabParallelHead
from engine.parallel.fused_loss import Projection
from engine_kernels.ops import Kernels
from engine_kernels.reference.attention import attention
from engine_kernels.reference.linear_cross_entropy import linear_cross_entropy
from tests.helpers.models import (
    BERT,
    GPT2,
    LLAMA,
    MODELS,
    batch_of,
    config_of,
    feed_of,
    layers_of,
    loss_and_gradients,
    noisy_weights,
)

CTX = ParallelContext.single()
by_name = pytest.mark.parametrize("cfg", MODELS, ids=lambda cfg: cfg.name)
EXTRA: dict[str, Any] = {"train__label_smoothing": 0.1, "train__z_loss": 0.01}


def stack_of(cfg: ModelConfig, **kernels: Any) -> Stack:
    layers = layers_of(cfg, kernels=Kernels(attention=attention, **kernels))
    (stack,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE)
    return stack.eval()


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@by_name
@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["plain", "smoothed"])
def test_it_is_the_loss_of_the_logits(cfg: ModelConfig, extra: dict[str, Any]) -> None:
    batch = batch_of(cfg, padded=True)
    expected = loss_and_gradients(cfg, stack_of(cfg), batch, **extra)
    assert_equal(
        loss_and_gradients(cfg, stack_of(cfg, linear_cross_entropy=linear_cross_entropy), batch, **extra), expected
    )


def test_logits_that_are_scaled_by_the_width() -> None:
    cfg = replace(GPT2, mup_base_width=8)
    fused = stack_of(cfg, linear_cross_entropy=linear_cross_entropy)
    assert fused(None, feed_of(cfg, batch_of(cfg))).scale == 0.25
    batch = batch_of(cfg)
    assert_equal(loss_and_gradients(cfg, fused, batch), loss_and_gradients(cfg, stack_of(cfg), batch))


@pytest.mark.parametrize("cfg", [LLAMA, BERT], ids=lambda cfg: cfg.name)
def test_a_compiled_loss_leaves_it_as_it_is(cfg: ModelConfig) -> None:
    fused, batch = stack_of(cfg, linear_cross_entropy=linear_cross_entropy), batch_of(cfg, padded=True)
    feed = feed_of(cfg, batch)
    torch._dynamo.reset()
    loss = build_loss(config_of(cfg), CTX)
    loss.compile(backend="aot_eager")
    share = loss(fused(None, feed), feed)
    share.backward()
    expected = loss_and_gradients(cfg, stack_of(cfg), batch)
    gradients = [p.grad for p in fused.parameters()]
    torch.testing.assert_close(share.detach(), expected[0], rtol=1e-6, atol=0)
    assert len(gradients) == len(expected[1])
    for found, gradient in zip(gradients, expected[1].values(), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def test_the_weight_that_stands_in_for_it_gets_the_gradient() -> None:
    head = VocabParallelHead(7, 4, padded=8, tp=SINGLE, init_std=1.0)
    torch.nn.init.normal_(head.weight)
    head.stand_in = head.weight.detach().requires_grad_()
    given = head.projection(torch.randn(2, 3, 4), linear_cross_entropy, 0.5)
    assert isinstance(given, Projection) and given.weight_VD() is head.stand_in
    assert (given.scale, given.bias_V) == (0.5, None)
