"""A model cut over tensor-parallel or context-parallel ranks computes what one rank computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.dist.context import AxisGroup
from engine.parallel.logical import logical_of
from tests.helpers.models import MODELS, batch_of, loss_and_gradients, whole_model
from tests.helpers.threads import context_of, on_axis


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the expected norm; a key's bias has no gradient but rounding, so at least over 1."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1.0))


@pytest.mark.parametrize("cfg", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("size", [2, 4])
def test_cut_over_tp_it_has_the_loss_and_gradients_of_one_rank(
    cfg: ModelConfig, size: int, dropout: float, sequence: bool
) -> None:
    cfg = replace(cfg, num_kv_heads=4, dropout=dropout, attention_dropout=dropout)
    batch = batch_of(cfg, 2, 8, padded=True)
    loss, grads = loss_and_gradients(cfg, whole_model(cfg).train(), batch)

    def rank(tp: AxisGroup) -> tuple[Tensor, dict[str, Tensor], list]:
        ctx = context_of(tp)
        model = whole_model(cfg, ctx, parallel__sequence=sequence).train()
        mine, own = loss_and_gradients(cfg, model, batch, ctx, parallel__sequence=sequence)
        return mine, own, [logical_of(p) for p in model.parameters()]

    ranks = on_axis(rank, size)
    assert len(ranks[0][1]) == len(grads)
    for mine, own, _ in ranks:
        torch.testing.assert_close(mine, loss, rtol=1e-6, atol=0)
        assert own.keys() == grads.keys()
    for logical in ranks[0][2]:
        slices = [own[logical.name] for _, own, _ in ranks]
        if logical.dim is None:
            for other in slices[1:]:
                torch.testing.assert_close(other, slices[0], rtol=1e-5, atol=1e-6, msg=logical.name)
        expected = grads[logical.name][: logical.shape[0]]
        assert relative(logical.assemble(slices), expected) <= 1e-5, logical.name


@pytest.mark.parametrize("cfg", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("size", [2, 4])
def test_cut_over_context_its_shares_and_gradients_sum_to_those_of_one_rank(
    cfg: ModelConfig, size: int, dropout: float
) -> None:
    cfg = replace(cfg, dropout=dropout, attention_dropout=dropout)
    batch = batch_of(cfg, 2, 8, padded=True)
    loss, grads = loss_and_gradients(cfg, whole_model(cfg).train(), batch)

    def rank(cp: AxisGroup) -> tuple[Tensor, dict[str, Tensor]]:
        ctx = context_of(cp=cp)
        return loss_and_gradients(cfg, whole_model(cfg, ctx).train(), batch, ctx)

    shares, found = zip(*on_axis(rank, size), strict=True)
    torch.testing.assert_close(torch.stack(shares).sum(), loss, rtol=1e-6, atol=0)
    for name, expected in grads.items():
        # A rank whose part of the sequence a parameter never meets has no gradient for it.
        total = torch.stack([own[name] for own in found if name in own]).sum(0)
        assert relative(total, expected) <= 1e-5, name
