"""Each optimizer against its formula, written out for whole tensors, and against another's implementation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as HfAdafactor

from engine.config import OptimConfig, OptimizerName
from engine.dist.context import SINGLE, ParallelContext
from engine.optim.groups import build_optimizer
from engine.optim.muon import orthogonalized
from engine.optim.pieces import LogicalOptimizer, Piece
from engine.parallel.logical import LogicalTensor, logical_of
from tests.helpers.tensors import TENSORS, Bowls, values

LR, DECAY = 0.05, 0.3
STEPS = 4


def trained(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = STEPS) -> dict[str, Tensor]:
    """The parameters of `Bowls` after some steps."""
    model = Bowls(SINGLE)
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.tensor(1.0)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def ours(name: OptimizerName, **options: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    cfg = OptimConfig(name=name, **{"lr": LR, "weight_decay": DECAY, **options})
    return lambda model: build_optimizer(model.parameters(), cfg, ParallelContext.single())


Rule = Callable[[LogicalTensor, Tensor, Tensor, dict[str, Tensor], int], Tensor]


def by_formula(rule: Rule, steps: int = STEPS) -> dict[str, Tensor]:
    """The same with `rule(logical, w, gradient, state, step)`, which gives the new w."""
    weights, goals, curves = values(1), values(2), {n: v.exp() for n, v in values(3).items()}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for step in range(1, steps + 1):
        for name, w in weights.items():
            weights[name] = rule(TENSORS[name], w, curves[name] * (w - goals[name]), states[name], step)
    return weights


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-5) -> None:
    for name, value in wanted.items():
        kept = found[name][: len(value)]
        torch.testing.assert_close(kept, value, rtol=rtol, atol=rtol, msg=lambda text, n=name: f"{n}: {text}")
        assert not found[name][len(value) :].any(), "padding stays zero"


def adam(g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.95 * state.get("v", 0) + 0.05 * g**2
    return (state["m"] / (1 - 0.9**step)) / ((state["v"] / (1 - 0.95**step)).sqrt() + 1e-8)


def lion(logical: LogicalTensor, w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    m = state.get("m", torch.zeros_like(g))
    state["m"] = 0.95 * m + 0.05 * g
    return w - LR * ((0.9 * m + 0.1 * g).sign() + (DECAY if logical.decay else 0.0) * w)


def lamb(logical: LogicalTensor, w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    u = adam(g, state, step)
    if not logical.decay:
        return w - LR * u
    u = u + DECAY * w
    return w - LR * w.norm() / u.norm() * u


def muon(logical: LogicalTensor, w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    w = w * (1 - LR * DECAY) if logical.decay else w
    if logical.role != "matrix":
        return w - LR * adam(g, state, step)
    state["m"] = 0.95 * state.get("m", 0) + g
    u = g + 0.95 * state["m"]
    parts = []
    for part in u.split(logical.segments or (u.shape[0],)):
        x = part / part.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        parts.append(x * 0.2 * math.sqrt(max(part.shape)))
    return w - LR * torch.cat(parts)


def adafactor(logical: LogicalTensor, w: Tensor, g: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    keep = 1 - step**-0.8
    if w.dim() == 2:
        state["r"] = keep * state.get("r", 0) + (1 - keep) * (g**2).sum(1)
        state["c"] = keep * state.get("c", 0) + (1 - keep) * (g**2).sum(0)
        v = torch.outer(state["r"], state["c"]) / state["r"].sum()
    else:
        v = state["v"] = keep * state.get("v", 0) + (1 - keep) * g**2
    u = g / v.sqrt()
    u = u / max(1.0, float(u.square().mean().sqrt()))
    return w - LR * (u + (DECAY if logical.decay else 0.0) * w)


@pytest.mark.parametrize("rule", [lion, lamb, muon, adafactor], ids=lambda rule: rule.__name__)
def test_a_step_is_its_formula(rule: Rule) -> None:
    same(trained(ours(OptimizerName(rule.__name__))), by_formula(rule))


def test_the_formula_of_one_is_not_that_of_another() -> None:
    with pytest.raises(AssertionError):
        same(trained(ours(OptimizerName.lamb)), by_formula(adafactor))


def test_adafactor_is_that_of_transformers() -> None:
    def theirs(model: nn.Module) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in model.parameters() if logical_of(p).decay is decay], "weight_decay": DECAY * decay}
            for decay in (True, False)
        ]
        return HfAdafactor(groups, lr=LR, scale_parameter=False, relative_step=False)

    found, wanted = trained(ours(OptimizerName.adafactor)), trained(theirs)
    del found["t0"], wanted["t0"]  # Theirs counts the rows of padding when it averages.
    same(found, wanted)


def test_muon_is_that_of_torch_but_for_its_bf16() -> None:
    names = ["t2", "t3"]

    def theirs(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [model.get_parameter(name) for name in names]
        return torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")

    found, wanted = trained(ours(OptimizerName.muon)), trained(theirs)
    start = values(1)
    for name in names:
        moved = (wanted[name] - start[name]).norm()
        assert (found[name] - wanted[name]).norm() < 0.02 * moved, "bf16 has a relative precision of 0.4 %"


def test_momentum_of_muon_can_be_set() -> None:
    assert ours(OptimizerName.muon)(Bowls(SINGLE)).defaults["momentum"] == 0.95
    assert ours(OptimizerName.muon, momentum=0.8)(Bowls(SINGLE)).defaults["momentum"] == 0.8


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_singular_values_become_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    left, s, right = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalized(matrix)
    assert result.shape == shape
    turned = left.T @ result @ right.T
    kept = s > 0.01 * s.max()
    assert kept.sum() >= min(shape) - 1
    assert ((turned.diag()[kept] > 0.6) & (turned.diag()[kept] < 1.3)).all()
    torch.testing.assert_close(turned, turned.diag().diag(), rtol=0, atol=1e-3)


def test_a_matrix_without_gradient_stays() -> None:
    assert not orthogonalized(torch.zeros(4, 6)).any()


LOGICAL_ONES = [OptimizerName.lamb, OptimizerName.muon, OptimizerName.adafactor]


@pytest.mark.parametrize("name", LOGICAL_ONES)
def test_a_flat_tensor_moves_like_the_parameters_in_it(name: OptimizerName) -> None:
    """What ZeRO does on one rank, with a gap between the parameters and behind them."""
    model = Bowls(SINGLE)
    optimizer = ours(name)(model)
    assert isinstance(optimizer, LogicalOptimizer)
    pieces: dict[Tensor, list[Piece]] = {}
    for group in optimizer.param_groups:
        parameters, parts, offset = group["params"], [], 2
        flat = torch.zeros(sum(p.numel() + 3 for p in parameters) + 2)
        for p in parameters:
            part = Piece(logical=p.logical, local_shape=tuple(p.shape), start=0, offset=offset, size=p.numel())
            part.of(flat).copy_(p.detach().view(-1))
            p.data = part.of(flat).view(p.shape)
            parts.append(part)
            offset += p.numel() + 3
        pieces[flat] = parts
        group["params"] = [flat]
    optimizer.attach(pieces, sharded=True)
    for _ in range(STEPS):
        model.zero_grad()
        model(torch.tensor(1.0)).backward()
        gradients = {p.logical.name: p.grad for p in model.parameters()}
        for flat, parts in pieces.items():
            flat.grad = torch.zeros_like(flat)
            for part in parts:
                part.of(flat.grad).copy_(gradients[part.logical.name].view(-1))
        optimizer.step()
    wanted = trained(ours(name))
    for parameter_name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), wanted[parameter_name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOGICAL_ONES)
def test_a_tensor_that_nobody_explained_is_refused(name: OptimizerName) -> None:
    optimizer = ours(name)(Bowls(SINGLE))
    flat = torch.zeros(8)
    flat.grad = torch.ones(8)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="call attach_pieces after deepspeed.initialize"):
        optimizer.step()


@pytest.mark.parametrize("name", [*LOGICAL_ONES, OptimizerName.lion])
def test_parameters_without_gradient_are_passed_over(name: OptimizerName) -> None:
    model = Bowls(SINGLE)
    optimizer = ours(name)(model)
    model.get_parameter("t1").grad = torch.ones(16, 6)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["t1"]


@pytest.mark.parametrize("name", [*LOGICAL_ONES, OptimizerName.lion])
def test_a_restored_state_goes_on_as_if_never_stopped(name: OptimizerName) -> None:
    def run(stop: bool) -> dict[str, Tensor]:
        model = Bowls(SINGLE)
        optimizer = ours(name)(model)
        for step in range(STEPS):
            if stop and step == 2:
                saved = optimizer.state_dict()
                optimizer = ours(name)(model)
                optimizer.load_state_dict(saved)
            model.zero_grad()
            model(torch.tensor(1.0)).backward()
            optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters()}

    same(run(stop=True), run(stop=False), rtol=0.0)
