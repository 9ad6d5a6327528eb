"""Tiles compute what the whole computes, add up weights' gradients in fp32, and keep one tile's inside at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.config.enums import Recompute, Tiles
from engine.dist.context import SINGLE
from engine.model.block import Block
from engine.model.layers import Stack, build_stacks
from engine.model.tiled import tiled
from tests.helpers.models import LLAMA, MODELS, batch_of, layers_of, loss_and_gradients, noisy_weights

KINDS = [Tiles.mlp, Tiles.block]


def model_of(
    cfg: ModelConfig, tiles: Tiles, tokens: int, dtype: torch.dtype = torch.float64, **groups: object
) -> Stack:
    layers = layers_of(cfg, train__tiles=tiles, train__tile_tokens=tokens)
    (model,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE, **groups)  # type: ignore[arg-type]
    return model.to(dtype).train()


@pytest.mark.parametrize("cfg", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize("tiles", KINDS)
@pytest.mark.parametrize(("tokens", "groups"), [(1, {}), (6, {"recompute": 2, "nested": True})])
def test_loss_and_gradients_are_those_of_the_whole(
    cfg: ModelConfig, tiles: Tiles, tokens: int, groups: dict[str, Any]
) -> None:
    cfg, batch = replace(cfg, dropout=0.3, attention_dropout=0.2), batch_of(cfg, 2, 8, padded=True)
    loss, want = loss_and_gradients(cfg, model_of(cfg, Tiles.none, 1), batch)
    again, got = loss_and_gradients(cfg, model_of(cfg, tiles, tokens, **groups), batch)
    assert torch.allclose(again, loss, rtol=1e-6)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        # fp64, but for the parts that are fp32 whatever the dtype: the loss and the keys of dropout.
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


class Position(nn.Module):
    """Two tensors in, two out, of as many runs as the second has; counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        self.seen: list[int] = []

    def forward(self, x: Tensor, y: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        self.seen.append(x.shape[1])
        runs = y.shape[1] // x.shape[1]
        h = x.repeat(1, runs, 1) * y if keys is None else x.repeat(1, runs, 1) * y * keys.repeat(1, runs)[..., None]
        return torch.tanh(h @ self.weight.t()), h.sum(-1)


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("tile", [1, 3, 7, 9])
@pytest.mark.parametrize("with_keys", [False, True])
def test_arguments_of_several_runs_are_cut_alike(runs: int, tile: int, with_keys: bool) -> None:
    torch.manual_seed(0)
    part = Position()
    x, y = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, 7 * runs, 3, dtype=torch.float64)
    keys = torch.randint(0, 2, (2, 7)) if with_keys else None
    results = []
    for run in (lambda *a: part(*a), lambda *a: tiled(part, a, list(part.parameters()), tile=tile)):
        ends = x.clone().requires_grad_(), y.clone().requires_grad_()
        part.weight.grad = None
        first, second = run(*ends, keys)
        (first.square().sum() + (second * 3).sum()).backward()
        results.append((first, second, ends[0].grad, ends[1].grad, part.weight.grad))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert max(part.seen[1:]) <= tile or tile > 7
    assert len(part.seen) == 1 + 2 * -(-7 // tile), "each tile twice: forward, and again in the backward pass"


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    part, x = Position(), torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, 3, dtype=torch.float64)
    part.weight.requires_grad_(False)
    tiled(part, (x, y, None), list(part.parameters()), tile=2)[0].sum().backward()
    assert x.grad is not None
    assert part.weight.grad is None
    with torch.no_grad():
        assert not tiled(part, (x, y, None), list(part.parameters()), tile=2)[0].requires_grad


def test_a_recomputed_group_ends_before_the_tiles_of_its_last_part() -> None:
    part, x = Position(), torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 4, 3, dtype=torch.float64)

    def group(x: Tensor) -> Tensor:
        return tiled(part, (torch.sin(x), y, None), list(part.parameters()), tile=2)[0]  # type: ignore[no-any-return]

    torch.utils.checkpoint.checkpoint(group, x, use_reentrant=False).sum().backward()
    assert len(part.seen) == 4, "two tiles forward and two in their backward pass, none in the recomputation"


def test_bf16_weights_gradients_of_many_tiles_are_added_in_fp32() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    # Gradients of one sign: a sum in bf16 stops growing at 2**8 times its terms.
    x = torch.rand(1, 2048, 64).bfloat16().requires_grad_()
    exact = torch.ones(2048, 64).t() @ x[0].detach().float()

    def error(tile: int) -> float:
        layer.weight.grad = None
        (out,) = tiled(lambda x: (layer(x),), (x,), list(layer.parameters()), tile=tile)
        out.sum().backward()
        assert layer.weight.grad is not None
        return float((layer.weight.grad.float() - exact).norm() / exact.norm())

    whole = error(2048)
    assert error(1) <= 2 * whole
    assert error(64) <= 2 * whole


@pytest.mark.parametrize("tiles", KINDS)
def test_compiled_blocks_compile_their_tiles(tiles: Tiles) -> None:
    torch._dynamo.reset()
    cfg = replace(LLAMA, num_layers=9)
    batch = batch_of(cfg, 2, 8)
    loss, want = loss_and_gradients(cfg, model_of(cfg, Tiles.none, 1, torch.float32), batch)
    model = model_of(cfg, tiles, 8, torch.float32, recompute=2)
    graphs: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    for block in model.modules():
        if isinstance(block, Block):
            block.compile(backend=backend)
    again, got = loss_and_gradients(cfg, model, batch)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, gradient in want.items():
        scale = max(float(gradient.norm()), 1e-3)
        assert float((got[name] - gradient).norm()) <= 1e-6 * scale * 3, name
    inside = [names for names in graphs if any("silu" in name for name in names)]
    assert inside, "the feed-forward is inside a compiled graph"
    assert len(graphs) <= 8, "the graphs of one block serve them all"
    torch._dynamo.reset()


def test_selective_recomputation_goes_with_tiles() -> None:
    batch = batch_of(LLAMA, 2, 8)
    _, want = loss_and_gradients(LLAMA, model_of(LLAMA, Tiles.none, 1), batch)
    layers = layers_of(LLAMA, train__tiles=Tiles.block, train__tile_tokens=6, train__recompute=Recompute.selective)
    (model,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE)
    _, got = loss_and_gradients(LLAMA, model.double().train(), batch)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-9, msg=name)
