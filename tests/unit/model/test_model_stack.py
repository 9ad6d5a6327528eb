"""How layers are cut into stages, grouped for recomputation and built."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.dist.context import SINGLE
from engine.model.feed import Feed
from engine.model.layers import LayerDef, Stack, build_stacks
from tests.helpers.models import BERT, GPT2, batch_of, feed_of, layers_of, logits_of, noisy_weights


class Doubled(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.factor


def layer(name: str, *, repeats: bool) -> LayerDef:
    return LayerDef(name, Doubled, lambda module, x, feed: module(x), repeats=repeats)


def stack_of(pattern: str, recompute: int) -> Stack:
    """A stack of blocks (b) and other layers (o)."""
    layers = [layer(f"{kind}.{i}", repeats=kind == "b") for i, kind in enumerate(pattern)]
    return Stack(layers, [one.factory() for one in layers], recompute)


@pytest.mark.parametrize(
    ("pattern", "recompute", "groups"),
    [
        ("obbbo", 0, ["o", "b", "b", "b", "o"]),
        ("obbbo", 1, ["o", "B", "B", "B", "o"]),
        ("obbbo", 2, ["o", "BB", "B", "o"]),
        ("obbbo", 3, ["o", "BBB", "o"]),
        ("obbbo", 9, ["o", "BBB", "o"]),
        ("bbbbb", 2, ["BB", "BB", "B"]),
        ("oo", 2, ["o", "o"]),
        ("", 1, []),
    ],
)
def test_blocks_are_recomputed_in_groups(pattern: str, recompute: int, groups: list[str]) -> None:
    found = stack_of(pattern, recompute).groups
    assert [pattern[a:b].upper() if again else pattern[a:b] for a, b, again in found] == groups
    assert [a for a, _, _ in found] + [len(pattern)] == [0] + [b for _, b, _ in found]


@pytest.mark.parametrize(("recompute", "train", "passes"), [(0, True, 1), (2, True, 2), (2, False, 1)])
def test_only_training_computes_groups_again(recompute: int, train: bool, passes: int) -> None:
    stack = stack_of("obbb", recompute)
    feed: Feed = feed_of(GPT2, batch_of(GPT2))
    x = torch.ones(2, requires_grad=True)
    with torch.set_grad_enabled(train):
        y = stack(x, feed)
    assert y.tolist() == [16.0, 16.0]
    if train:
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [16.0, 16.0]
    assert [part.calls for part in stack.parts] == [1] + [passes] * 3


@pytest.mark.parametrize("cfg", [GPT2, BERT], ids=lambda c: c.name)
def test_stacks_one_after_the_other_are_the_whole_model(cfg) -> None:  # noqa: ANN001
    layers, feed = layers_of(cfg), feed_of(cfg, batch_of(cfg, 2, 6))
    spans = [(0, 2), (2, 3), (3, len(layers))]
    (whole,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE)
    first, second, third = build_stacks(layers, spans, noisy_weights(), tp=SINGLE)
    x = second(first(None, feed), feed)
    out = third(x, feed)
    assert torch.equal(out[0] if isinstance(out, tuple) else out, logits_of(whole, feed))
    assert third.parts[layers.index(next(one for one in layers if one.name == "head")) - 3] is first.parts[0], "tied"


def test_each_module_is_converted_once_as_it_is_built() -> None:
    seen: list[nn.Module] = []

    def convert(module: nn.Module) -> nn.Module:
        seen.append(module)
        return module.double()

    layers = layers_of(GPT2)
    (stack,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE, convert=convert)
    assert len(seen) == len(layers) - 1, "the tied head is built with the embedding"
    assert {p.dtype for p in stack.parameters()} == {torch.float64}
