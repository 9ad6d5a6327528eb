from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.config import ModelConfig, OptimConfig, OptimizerName
from engine.dist.context import ParallelContext
from engine.optim.groups import build_optimizer, parameter_groups
from engine.parallel.logical import logical_of
from tests.helpers.models import FLAVOURS, GPT2, LLAMA, whole_model

ONE = ParallelContext.single()
DECAY = OptimConfig(lr=0.1, weight_decay=0.3)


def names(group: dict) -> set[str]:
    return {logical_of(p).name for p in group["params"]}


@pytest.mark.parametrize("cfg", [*FLAVOURS, replace(GPT2, tied_head=False)], ids=lambda c: c.name)
def test_matrices_and_embeddings_decay_norms_and_biases_do_not(cfg: ModelConfig) -> None:
    model = whole_model(cfg)
    decayed, plain = parameter_groups(model.parameters(), DECAY)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    shapes = {logical_of(p).name: p.dim() for p in model.parameters()}
    assert names(decayed) == {name for name, dims in shapes.items() if dims == 2}
    assert names(plain) == {name for name, dims in shapes.items() if dims == 1}
    assert "embed.tokens.weight" in names(decayed)
    assert "final_norm.weight" in names(plain)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_an_empty_group_is_left_out() -> None:
    model = whole_model(LLAMA)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert [group["weight_decay"] for group in parameter_groups(matrices, DECAY)] == [0.3]
    assert parameter_groups([], DECAY) == []


def stepped(cfg: OptimConfig, steps: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter before and after `steps` steps with a gradient of ones."""
    model: nn.Module = whole_model(GPT2)
    before = {logical_of(p).name: p.detach().clone() for p in model.parameters()}
    optimizer = build_optimizer(model.parameters(), cfg, ONE)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return {logical_of(p).name: (before[logical_of(p).name], p.detach()) for p in model.parameters()}


def test_adamw_decays_apart_from_the_gradient() -> None:
    # With equal gradients m / sqrt(v) is 1, so a step is lr * (1 + decay * w).
    cfg = OptimConfig(lr=0.1, weight_decay=0.5, eps=1e-12)
    for name, (before, after) in stepped(cfg, 1).items():
        decay = 0.5 if before.dim() == 2 else 0.0
        torch.testing.assert_close(after, before - 0.1 * (1 + decay * before), rtol=1e-5, atol=1e-6, msg=name)


def test_adamw_has_the_betas_and_eps_of_the_config() -> None:
    optimizer = build_optimizer(
        whole_model(GPT2).parameters(), OptimConfig(lr=0.1, beta1=0.8, beta2=0.7, eps=1e-3), ONE
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.7), 1e-3, 0.1)


def test_sgd_has_momentum() -> None:
    cfg = OptimConfig(name=OptimizerName.sgd, lr=0.1, momentum=0.5, weight_decay=0.0)
    # Two steps move by lr * (1 + 1.5).
    for name, (before, after) in stepped(cfg, 2).items():
        torch.testing.assert_close(before - after, torch.full_like(before, 0.25), rtol=1e-5, atol=1e-5, msg=name)
