"""fp8 linears cut over tp, whose slices have scales of their own, with and without sequence parallelism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.dist.context import SINGLE, AxisGroup
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine.parallel.logical import logical_of, name_parameters
from engine_kernels.kernels import PLAIN_LINEAR
from engine_kernels.reference.fp8_linear import E4M3, emulated, scale_of
from tests.helpers.fp8 import error_bound, exact
from tests.helpers.threads import on_axis

B, S, D, O = 2, 8, 32, 64  # noqa: E741
Layer = type[ColumnParallelLinear] | type[RowParallelLinear]


def logical_weight(name: str, shape: tuple[int, ...], *, equal_slices: bool) -> Tensor:
    """Random; with `equal_slices` every row and column has the same largest magnitude, so that all scales are equal."""
    weight = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    if equal_slices and len(shape) == 2:
        # A diagonal that repeats.
        rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
        weight[(rows - columns) % 16 == 0] = 0.5
    return weight.bfloat16()


def run(kind: Layer, size: int, *, sequence: bool, equal_slices: bool = False) -> dict[str, Tensor]:
    """The whole output, and whole gradients of x, weight and bias, by a layer in bf16 on `size` ranks."""
    inner, outer = (D, O) if kind is ColumnParallelLinear else (O, D)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, S, inner, generator=generator).bfloat16()
    x[..., ::16] = 4.0 if equal_slices else x[..., ::16]
    grad = (1e-3 * torch.randn(B, S, outer, generator=generator)).bfloat16()
    grad[..., ::16] = 8e-3 if equal_slices else grad[..., ::16]
    cuts = {ColumnParallelLinear: (1 if sequence else None, 2), RowParallelLinear: (2, 1 if sequence else None)}
    into, out = cuts[kind]

    def part(tensor: Tensor, dim: int | None, tp: AxisGroup) -> Tensor:
        return tensor if dim is None else tensor.chunk(tp.size, dim)[tp.rank].contiguous()

    def rank(tp: AxisGroup) -> tuple[Tensor, ...]:
        layer = kind(inner, outer, tp=tp, bias=True, init_std=1.0, sequence=sequence, how=emulated)
        assert layer.how is emulated
        layer.bfloat16()
        with torch.no_grad():
            for parameter in name_parameters("layer", layer):
                logical = logical_of(parameter)
                whole = logical_weight(logical.name, logical.shape, equal_slices=equal_slices)
                parameter.copy_(logical.local_slice(whole, tp.rank, tp.size))
        own = part(x, into, tp).clone().requires_grad_()
        y = layer(own)
        y.backward(part(grad, out, tp))
        assert own.grad is not None
        return y.detach(), own.grad, *(parameter.grad for parameter in layer.parameters())

    ys, xs, weights, biases = zip(*on_axis(rank, size), strict=True)
    layer = kind(inner, outer, tp=SINGLE, bias=True, init_std=1.0)
    name_parameters("layer", layer)
    if sequence and kind is RowParallelLinear:
        # Each rank adds its own positions' gradients up, and all of them have the sum.
        assert all(torch.equal(bias, biases[0]) for bias in biases)

    def whole(parts: tuple[Tensor, ...], dim: int | None) -> Tensor:
        return parts[0] if dim is None or size == 1 else torch.cat(parts, dim)

    found = {
        "y": whole(ys, out),
        "x": whole(xs, into),
        "weight": logical_of(layer.weight).assemble(list(weights)),
        "bias": logical_of(layer.bias).assemble(list(biases)),  # type: ignore[arg-type]
    }
    inputs = (x, logical_weight("layer.weight", (outer, inner), equal_slices=equal_slices))
    bias = logical_weight("layer.bias", (outer,), equal_slices=equal_slices)
    return found | {"inputs": (*inputs, bias, grad)}  # type: ignore[dict-item]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_two_ranks_are_within_the_rounding_of_fp8_as_one_is(kind: Layer, sequence: bool) -> None:
    """Independent scales round otherwise: each layout is off by at most what its own rounding allows, which is no more
    than that of one rank, as no slice has a larger number than the whole. Partial sums are rounded to bf16 besides.
    """
    one, two = run(kind, 1, sequence=sequence), run(kind, 2, sequence=sequence)
    tensors = two.pop("inputs")
    bounds, wanted = error_bound(*tensors), exact(*tensors)  # type: ignore[misc]
    for name, value in two.items():
        partial_sums = 2 * 2**-8 * wanted[name].abs().max()
        assert ((value - wanted[name]).abs() <= bounds[name] + partial_sums).all(), name
        assert ((one[name] - wanted[name]).abs() <= bounds[name]).all(), name


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_with_equal_scales_two_ranks_are_one_but_for_the_rounding_of_partial_sums(kind: Layer, sequence: bool) -> None:
    one, two = (run(kind, size, sequence=sequence, equal_slices=True) for size in (1, 2))
    x, weight, *_ = one.pop("inputs")
    assert scale_of(weight, E4M3) == scale_of(weight[:16, :16], E4M3)
    for name, value in one.items():
        if name != "inputs":
            # Two parts and their sum, each rounded to bf16; what is not summed over the axis is equal.
            summed = {"x"} if kind is ColumnParallelLinear else {"y", "bias"} if sequence else {"y"}
            slack = 3 * 2**-8 * value.abs().max() if name in summed else 0
            assert ((value - two[name]).abs() <= slack).all(), name


def test_a_slice_of_an_unsuitable_size_stays_in_bf16() -> None:
    layers = on_axis(lambda tp: ColumnParallelLinear(32, 48, tp=tp, bias=False, init_std=1.0, how=emulated).how, 2)
    assert layers == [PLAIN_LINEAR, PLAIN_LINEAR]
    assert RowParallelLinear(48, 32, tp=SINGLE, bias=False, init_std=1.0, how=emulated).how is emulated
