"""Collectives with gradients: values, adjoints, and the gradients of a computation that is not cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.dist import collectives as c
from engine.dist.context import AxisGroup
from engine.parallel.split_linear import column_linear
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

SHAPE = (4, 8, 12)
DIMS = (0, 1, 2, -1)


def axes() -> list[AxisGroup]:
    """All ranks; with four of them also this rank and the one two further on."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = [AxisGroup(rank=rank, size=world, ranks=tuple(range(world)), group=dist.group.WORLD)]
    if world == 4:
        pairs = [(0, 2), (1, 3)]
        groups = [dist.new_group(list(pair)) for pair in pairs]
        found.append(AxisGroup(rank=rank // 2, size=2, ranks=pairs[rank % 2], group=groups[rank % 2]))
    return found


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """The same on every rank that asks with this seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_rank(axis: AxisGroup, seed: int, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """Another tensor for each rank of the axis, known to all."""
    return [draw(seed + r, shape) for r in range(axis.size)]


def part(x: Tensor, axis: AxisGroup, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank]


def values(axis: AxisGroup, dim: int) -> None:
    """What each operator gives, against the tensors of all ranks."""
    mine, everyone = draw(axis.rank), per_rank(axis, 0)
    for found, expected in (
        (c.copy_to_axis(mine, axis), mine),
        (c.sum_over_axis(mine, axis), torch.stack(everyone).sum(0)),
        (c.collect_over_axis(mine, axis, dim), torch.cat(everyone, dim)),
        (c.gather_over_axis(mine, axis, dim), torch.cat(everyone, dim)),
        (c.scatter_sum_over_axis(mine, axis, dim), part(torch.stack(everyone).sum(0), axis, dim)),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert found.is_contiguous()
    for gather in range(3):
        if gather != dim % 3:
            found = c.exchange_over_axis(mine, axis, split_dim=dim, gather_dim=gather)
            assert torch.equal(found, torch.cat([part(x, axis, dim) for x in everyone], gather))


def operators(axis: AxisGroup, dim: int) -> list[tuple[str, Callable[[Tensor], Tensor], bool, bool]]:
    """Name, operator, and whether its input and its output are the same on all ranks by its contract."""
    return [
        ("copy", lambda x: c.copy_to_axis(x, axis), True, False),
        ("sum", lambda x: c.sum_over_axis(x, axis), False, True),
        ("collect", lambda x: c.collect_over_axis(x, axis, dim), False, True),
        ("scatter_sum", lambda x: c.scatter_sum_over_axis(x, axis, dim), False, False),
        ("gather", lambda x: c.gather_over_axis(x, axis, dim), False, False),
        ("exchange", lambda x: c.exchange_over_axis(x, axis, split_dim=dim, gather_dim=dim - 1), False, False),
    ]


def adjoints(axis: AxisGroup, dim: int) -> None:
    """<A x, y> = <x, A* y>, added up over the ranks; what is the same on all ranks counts once."""

    def product(a: Tensor, b: Tensor, same: bool) -> Tensor:
        total = (a * b).sum()
        dist.all_reduce(total, group=axis.group)
        return total / axis.size if same else total

    for name, operator, same_in, same_out in operators(axis, dim):
        x = draw(0 if same_in else axis.rank).requires_grad_()
        out = operator(x)
        y = draw(100 if same_out else 100 + axis.rank, tuple(out.shape))
        (back,) = torch.autograd.grad(out, x, y.transpose(0, 1).contiguous().transpose(0, 1))
        left, right = product(out.detach(), y, same_out), product(x.detach(), back, same_in)
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n} along {dim}: {m}")
        if same_in:
            agreed = back.clone()
            dist.all_reduce(agreed, group=axis.group)
            torch.testing.assert_close(agreed / axis.size, back, rtol=0, atol=1e-12)


def layers(axis: AxisGroup, *, recompute: bool) -> None:
    """Sequence-parallel column and row layers around an exchange: gradients are those of one process."""
    x, up, down, weight = draw(1, (2, 8, 4)), draw(2, (4, 8)), draw(3, (8, 4)), draw(4, (2, 8, 4))

    def whole(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (torch.tanh(x @ up).cumsum(1) @ down) * x.cumsum(1)

    def cut(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        outer = torch.tanh(column_linear(x, up.t(), None, axis, sequence=True))
        inner = c.scatter_sum_over_axis(outer.cumsum(1) @ down, axis)
        turned = c.exchange_over_axis(x, axis, split_dim=2, gather_dim=1).cumsum(1)
        return inner * c.exchange_over_axis(turned, axis, split_dim=1, gather_dim=2)

    expected_in = [t.clone().requires_grad_() for t in (x, up, down)]
    expected = torch.autograd.grad((whole(*expected_in) * weight).sum(), expected_in)
    mine = [part(x, axis, 1), part(up, axis, 1), part(down, axis, 0)]
    mine = [t.clone().requires_grad_() for t in mine]
    out = checkpoint(cut, *mine, use_reentrant=False) if recompute else cut(*mine)
    found = torch.autograd.grad((out * part(weight, axis, 1)).sum(), mine)
    for got, want, dim in zip(found, expected, (1, 1, 0), strict=True):
        torch.testing.assert_close(got, part(want, axis, dim), rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(cut(*mine), out, rtol=0, atol=0)


def gradients_of_others(axis: AxisGroup) -> None:
    """A gradient that autograd also hands to another branch is not changed."""
    x, other = (draw(i).requires_grad_() for i in (1, 2))
    (c.copy_to_axis(x, axis) + other).backward(draw(3))
    assert other.grad is not None
    assert torch.equal(other.grad, draw(3))


def low_precision(axis: AxisGroup) -> None:
    """Small integers are exact in bf16 and fp16, and gathered or exchanged they keep their dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        x = (torch.arange(16).reshape(1, 8, 2) + axis.rank).to(dtype)
        everyone = [(x.double() - axis.rank + r) for r in range(axis.size)]
        total = c.scatter_sum_over_axis(x, axis)
        assert total.dtype is dtype
        assert torch.equal(total.double(), part(sum(everyone, torch.zeros(1)), axis, 1))
        assert torch.equal(c.collect_over_axis(x, axis).double(), torch.cat(everyone, 1))


def everything() -> None:
    for axis in axes():
        for dim in DIMS:
            values(axis, dim)
            adjoints(axis, dim)
        layers(axis, recompute=False)
        layers(axis, recompute=True)
        gradients_of_others(axis)
        low_precision(axis)


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_over_ranks(world: int) -> None:
    run_ranks(everything, world)


def compiled() -> None:
    (axis,) = axes()

    def chain(x: Tensor) -> Tensor:
        x = c.scatter_sum_over_axis(c.collect_over_axis(x * 2, axis).sin(), axis)
        x = c.exchange_over_axis(x, axis, split_dim=2, gather_dim=1).sin()
        x = c.collect_over_axis(c.scatter_sum_over_axis(x, axis, 0).sin(), axis, 2)
        return c.sum_over_axis(c.copy_to_axis(x, axis).sin(), axis)

    x = draw(axis.rank).requires_grad_()
    plain, graph = chain(x), torch.compile(chain, backend="aot_eager")(x)
    torch.testing.assert_close(graph, plain, rtol=0, atol=1e-12)
    (found,), (expected,) = (torch.autograd.grad(out.sum(), x) for out in (graph, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_collectives_in_a_compiled_function_keep_their_gradients() -> None:
    run_ranks(compiled, 2, timeout_s=120)
