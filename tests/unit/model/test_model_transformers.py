"""Logits, loss and gradients of one rank against the models of transformers, with our weights copied into theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engine.config import Activation, ModelConfig
from engine.config.enums import Recompute
from engine.parallel.logical import logical_of
from tests.helpers.hf_models import comparable, inputs_of, relative_errors, with_weights
from tests.helpers.models import BERT, GPT2, LLAMA, NEOX, QWEN2, batch_of, feed_of, loss_and_gradients, whole_model

# Between the models only the order of sums differs.
TOLERANCE = 1e-5


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the expected norm, in fp64."""
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def logical_parts(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors in our parameters' shapes, padding cut off."""
    rows = {logical_of(p).name: logical_of(p).shape[0] for p in model.parameters()}
    return {name: tensor[: rows[name]] for name, tensor in tensors.items()}


def check(cfg: ModelConfig, *, padded: bool = False, **changes: object) -> None:
    batch = comparable(cfg, batch_of(cfg, 3, cfg.max_positions, padded=padded))
    ours = whole_model(cfg, **changes)
    weights = {logical_of(p).name: p.detach() for p in ours.parameters()}
    theirs = with_weights(cfg, logical_parts(weights, ours))
    expected = theirs(**inputs_of(cfg, batch))
    expected.loss.backward()
    with torch.no_grad():
        out = ours(None, feed_of(cfg, batch))
    logits, classes = out if isinstance(out, tuple) else (out, None)
    their_logits = (expected.logits if classes is None else expected.prediction_logits).detach()
    assert float(their_logits.abs().max()) > 1.0, "the comparison is not one of zeros"
    assert error(logits[..., : cfg.vocab_size], their_logits) <= TOLERANCE
    if classes is not None:
        assert error(classes, expected.seq_relationship_logits) <= TOLERANCE
    loss, grads = loss_and_gradients(cfg, ours, batch)
    their_loss = float(expected.loss.detach())
    assert abs(float(loss) - their_loss) <= TOLERANCE * their_loss
    errors = relative_errors(cfg, logical_parts(grads, ours), theirs)
    assert len(errors) == len(weights)
    assert {name: found for name, found in errors.items() if not found <= TOLERANCE} == {}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", [Activation.gelu_tanh, Activation.gelu])
def test_gpt2(activation: Activation, tied: bool) -> None:
    check(replace(GPT2, activation=activation, tied_head=tied, norm_eps=1e-3), padded=tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kv", "width", "base"), [(4, None, 10_000.0), (2, None, 500_000.0), (1, 12, 10_000.0)])
def test_llama(kv: int, width: int | None, base: float, tied: bool) -> None:
    check(replace(LLAMA, num_kv_heads=kv, head_dim=width, rotary_base=base, tied_head=tied, norm_eps=1e-3), padded=tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("fraction", "parallel", "activation"),
    [
        (0.25, True, Activation.gelu),
        (0.5, False, Activation.gelu),
        (0.75, True, Activation.gelu_tanh),
        (1.0, False, Activation.gelu),
    ],
)
def test_neox(fraction: float, parallel: bool, activation: Activation, tied: bool) -> None:
    cfg = replace(NEOX, rotary_fraction=fraction, parallel_residual=parallel, activation=activation, norm_eps=1e-3)
    check(replace(cfg, tied_head=tied, rotary_base=100.0), padded=tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kv", "width"), [(4, None), (2, None), (1, 12)])
def test_qwen2(kv: int, width: int | None, tied: bool) -> None:
    check(replace(QWEN2, num_kv_heads=kv, head_dim=width, tied_head=tied, norm_eps=1e-3), padded=tied)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_bert(recompute: Recompute, padded: bool) -> None:
    check(replace(BERT, norm_eps=1e-3), padded=padded, train__recompute=recompute)
