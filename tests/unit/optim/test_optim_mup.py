"""muP's coordinate check (arXiv 2203.03466, section D.1): how far activations move does not depend on the width."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig, OptimConfig, OptimizerName
from engine.config.derived import attention_scale, logit_scale, matrix_init_scale, width_ratio
from engine.dist.context import ParallelContext
from engine.optim.groups import build_optimizer, parameter_groups
from engine.optim.mup import lr_scale
from engine.optim.schedule import set_learning_rate
from engine.parallel.logical import LogicalTensor, Role, logical_of, make_parameter

BASE, INPUTS, CLASSES, STEPS = 64, 32, 16, 4
WIDTHS = (64, 128, 256, 512)
RATES = {
    OptimizerName.adamw: 0.01,
    OptimizerName.lion: 0.01,
    OptimizerName.adafactor: 0.01,
    OptimizerName.lamb: 0.05,
    OptimizerName.muon: 0.05,
    OptimizerName.sgd: 0.5,
}


def config(width: int, base: int | None = BASE) -> ModelConfig:
    return ModelConfig(
        name="m", num_layers=1, hidden_size=width, num_heads=4, vocab_size=8, max_positions=8, mup_base_width=base
    )


class Mlp(nn.Module):
    """Table, two hidden matrices, output projection: the roles of a transformer's parameters, without attention."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        width, hidden_std = cfg.hidden_size, BASE**-0.5 * matrix_init_scale(cfg)
        if cfg.mup_base_width is None:
            hidden_std = width**-0.5
        shapes: list[tuple[str, tuple[int, int], Role, float]] = [
            ("table", (INPUTS, width), "embedding", 1.0),
            ("first", (width, width), "matrix", hidden_std),
            ("second", (width, width), "matrix", hidden_std),
            ("head", (CLASSES, width), "head", BASE**-0.5),
        ]
        for name, shape, role, std in shapes:
            logical = LogicalTensor(shape, init_std=std, role=role, name=name)
            parameter = make_parameter(shape, logical)
            with torch.no_grad():
                parameter.copy_(logical.draw(5))
            self.register_parameter(name, parameter)
        self.scale = logit_scale(cfg)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After the first and the second matrix, and the logits."""
        first = F.linear(self.table[tokens], self.first)
        second = F.linear(torch.tanh(first), self.second)
        return first, second, self.scale * F.linear(torch.tanh(second), self.head)


def movements(name: OptimizerName, width: int, base: int | None) -> list[float]:
    """Root mean square of what `STEPS` steps change in each layer's output."""
    cfg = config(width, base)
    model = Mlp(cfg)
    optim = OptimConfig(name=name, lr=RATES[name], weight_decay=0.0)
    optimizer = build_optimizer(model.parameters(), optim, ParallelContext.single(), width_ratio=width_ratio(cfg))
    tokens = torch.arange(INPUTS)
    targets = tokens % CLASSES
    before = [x.detach() for x in model(tokens)]
    for _ in range(STEPS):
        set_learning_rate(optimizer, RATES[name])
        optimizer.zero_grad()
        F.cross_entropy(model(tokens)[-1], targets).backward()
        optimizer.step()
    return [float((x.detach() - y).square().mean().sqrt()) for x, y in zip(model(tokens), before, strict=True)]


def spread(rows: Sequence[Sequence[float]]) -> float:
    """The largest ratio over the widths, of the layer where it is largest."""
    return max(max(column) / min(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("name", list(OptimizerName))
def test_movements_stay_in_a_band_over_eightfold_width_only_with_mup(name: OptimizerName) -> None:
    band = 1.5
    with_mup = spread([movements(name, width, BASE) for width in WIDTHS])
    without = spread([movements(name, width, None) for width in WIDTHS])
    assert with_mup < band < without, (with_mup, without)


@pytest.mark.parametrize(
    ("name", "role", "wanted"),
    [
        (OptimizerName.adamw, "matrix", 0.25),
        (OptimizerName.adamw, "embedding", 1.0),
        (OptimizerName.adamw, "head", 1.0),
        (OptimizerName.adamw, "vector", 1.0),
        (OptimizerName.sgd, "matrix", 1.0),
        (OptimizerName.sgd, "embedding", 4.0),
        (OptimizerName.sgd, "vector", 4.0),
        (OptimizerName.muon, "matrix", 0.5),
        (OptimizerName.muon, "head", 1.0),
    ],
)
def test_rates_are_those_of_table_8(name: OptimizerName, role: Role, wanted: float) -> None:
    assert lr_scale(name, role, 4.0) == wanted


@pytest.mark.parametrize("name", list(OptimizerName))
def test_at_the_base_width_nothing_changes(name: OptimizerName) -> None:
    for role in ("matrix", "embedding", "head", "vector"):
        assert lr_scale(name, role, 1.0) == 1.0
    assert (width_ratio(config(BASE)), matrix_init_scale(config(BASE)), logit_scale(config(BASE))) == (1.0, 1.0, 1.0)


def test_the_model_is_told_its_scales() -> None:
    wide, plain = config(4 * BASE), config(4 * BASE, None)
    assert (width_ratio(wide), matrix_init_scale(wide), logit_scale(wide)) == (4.0, 0.5, 0.25)
    assert (width_ratio(plain), matrix_init_scale(plain), logit_scale(plain)) == (1.0, 1.0, 1.0)
    assert (attention_scale(wide), attention_scale(plain)) == (1 / 64, 1 / math.sqrt(64))


def test_groups_hold_their_scale_of_the_rate() -> None:
    model = Mlp(config(2 * BASE))
    groups = parameter_groups(model.parameters(), OptimConfig(lr=0.4), width_ratio=2.0)
    found = {logical_of(p).name: (group["lr_scale"], group["lr"]) for group in groups for p in group["params"]}
    matrix, other = (0.5, 0.2), (1.0, 0.4)
    assert found == {"table": other, "first": matrix, "second": matrix, "head": other}
