"""Split layers on threads against the same layers whole: outputs, gradients of inputs, gradients of weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.dist.context import SINGLE, AxisGroup
from engine.parallel.embedding import VocabParallelBias, VocabParallelEmbedding, VocabParallelHead
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine.parallel.logical import logical_of, name_parameters
from tests.helpers.threads import on_axis

D, F_, V, PADDED = 12, 16, 21, 32
SIZES = [1, 2, 4]


def fill(module: nn.Module, tp: AxisGroup) -> None:
    """This rank's slices of logical tensors that are random in biases too."""
    with torch.no_grad():
        for parameter in name_parameters("layer", module):
            logical = logical_of(parameter)
            generator = torch.Generator().manual_seed(len(logical.name))
            parameter.copy_(logical.local_slice(torch.randn(logical.shape, generator=generator), tp.rank, tp.size))


class Mlp(nn.Module):
    """Column, nonlinearity, row: the pair through which gradients enter and leave the axis."""

    def __init__(self, tp: AxisGroup, bias: bool) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(D, 2 * F_, tp=tp, bias=bias, init_std=1.0, segments=(F_, F_))
        self.down = RowParallelLinear(F_, D, tp=tp, bias=bias, init_std=1.0)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def run(make: Callable[[AxisGroup], nn.Module], x: Tensor, size: int) -> tuple[list[Tensor], list[Tensor | None], dict]:
    """Output and input gradient of each rank, and the assembled gradient of each parameter."""

    def rank(tp: AxisGroup) -> tuple[Tensor, Tensor | None, list]:
        module = make(tp)
        fill(module, tp)
        own = x.clone().requires_grad_(x.is_floating_point())
        y = module(own)
        y.square().sum().backward()
        return y.detach(), own.grad, [(logical_of(p), p.grad) for p in module.parameters()]

    outputs, inputs, parameters = zip(*on_axis(rank, size), strict=True)
    grads = {}
    for slices in zip(*parameters, strict=True):
        logical = slices[0][0]
        if logical.dim is None:
            for _, other in slices[1:]:
                torch.testing.assert_close(other, slices[0][1], rtol=0, atol=0)
        grads[logical.name] = logical.assemble([grad for _, grad in slices])
    return list(outputs), list(inputs), grads


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES[1:])
def test_column_and_row_make_the_whole_product_and_its_gradients(size: int, bias: bool) -> None:
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    (output,), (grad,), parameters = run(lambda tp: Mlp(tp, bias), x, 1)
    outputs, grads, assembled = run(lambda tp: Mlp(tp, bias), x, size)
    # Sums in another order: fp32 rounding only.
    for mine, mine_grad in zip(outputs, grads, strict=True):
        torch.testing.assert_close(mine, output, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(mine_grad, grad, rtol=1e-5, atol=1e-3)
    assert assembled.keys() == parameters.keys()
    assert len(parameters) == (4 if bias else 2)
    for name, value in parameters.items():
        torch.testing.assert_close(assembled[name], value, rtol=1e-5, atol=1e-3, msg=name)


def test_one_rank_computes_the_plain_linear_layer() -> None:
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(0))

    def check(tp: AxisGroup) -> None:
        for layer in (
            ColumnParallelLinear(D, F_, tp=tp, bias=True, init_std=1.0),
            RowParallelLinear(D, F_, tp=tp, bias=True, init_std=1.0),
        ):
            fill(layer, tp)
            assert layer.bias is not None
            torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias, rtol=1e-6, atol=1e-5)

    on_axis(check, 1)


class Tied(nn.Module):
    """Embedding and projection by the same table, and a bias; the columns of all ranks, squared, stand for a loss."""

    def __init__(self, tp: AxisGroup, sequence: bool = False) -> None:
        super().__init__()
        self.table = VocabParallelEmbedding(V, D, padded=PADDED, tp=tp, init_std=1.0, sequence=sequence)
        self.bias = VocabParallelBias(V, PADDED, tp)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bias(self.table(self.table(tokens), project=True))


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_looks_up_every_token(size: int) -> None:
    tokens = torch.arange(V).view(3, 7)
    table = torch.randn((V, D), generator=torch.Generator().manual_seed(len("layer.weight")))

    def rank(tp: AxisGroup) -> Tensor:
        layer = VocabParallelEmbedding(V, D, padded=PADDED, tp=tp, init_std=1.0)
        fill(layer, tp)
        return layer(tokens).detach()

    for mine in on_axis(rank, size):
        assert torch.equal(mine, table[tokens])


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", SIZES[1:])
def test_a_tied_table_cut_by_vocabulary_has_the_logits_and_gradient_of_the_whole(size: int, sequence: bool) -> None:
    tokens = torch.tensor([[0, 5, 20, 5], [19, 7, 8, 0]])
    (output,), _, parameters = run(Tied, tokens, 1)
    outputs, _, assembled = run(lambda tp: Tied(tp, sequence), tokens, size)
    torch.testing.assert_close(torch.cat(outputs, dim=-1), output, rtol=1e-5, atol=1e-5)
    assert len(parameters) == 2
    for name, expected in parameters.items():
        torch.testing.assert_close(assembled[name], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_a_head_of_its_own_gives_each_rank_its_columns(size: int) -> None:
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    table = torch.randn((V, D), generator=torch.Generator().manual_seed(len("layer.weight")))

    def rank(tp: AxisGroup) -> Tensor:
        head = VocabParallelHead(V, D, padded=PADDED, tp=tp, init_std=1.0)
        fill(head, tp)
        return head(x).detach()

    logits = torch.cat(on_axis(rank, size), dim=-1)
    assert logits.shape == (2, 3, PADDED)
    torch.testing.assert_close(logits[..., :V], x @ table.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits[..., V:], torch.zeros(2, 3, PADDED - V))


def test_a_bias_by_vocabulary_is_added_to_its_columns_and_zero_in_the_padding() -> None:
    logits = torch.randn(2, 3, PADDED, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(V, generator=torch.Generator().manual_seed(len("layer.weight")))

    def rank(tp: AxisGroup) -> Tensor:
        layer = VocabParallelBias(V, PADDED, tp)
        fill(layer, tp)
        return layer(logits.chunk(4, dim=-1)[tp.rank]).detach()

    expected = torch.cat([logits[..., :V] + bias, logits[..., V:]], dim=-1)
    assert torch.equal(torch.cat(on_axis(rank, 4), dim=-1), expected)


def test_a_stand_in_takes_the_place_of_the_table_in_both_uses() -> None:
    layer = VocabParallelEmbedding(V, D, padded=PADDED, tp=SINGLE, init_std=1.0)
    fill(layer, SINGLE)
    tokens = torch.tensor([[0, 5, 20]])
    expected = layer(layer(tokens), project=True)
    layer.stand_in = layer.weight.detach().requires_grad_()
    found = layer(layer(tokens), project=True)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert layer.weight.grad is None
    assert layer.stand_in.grad is not None
    assert layer.stand_in.grad.abs().sum() > 0
