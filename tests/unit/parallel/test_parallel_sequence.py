"""Sequence parallelism on threads: layers on a cut residual stream are the layers on the whole one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.dist.context import AxisGroup
from engine.model.norm import LayerNorm, RMSNorm
from engine.parallel.context import to_heads, to_positions
from engine.parallel.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from engine.parallel.logical import logical_of, name_parameters
from engine_kernels.ops import PLAIN_LINEAR, Kernels, Linear, sdpa_attention
from tests.helpers.threads import on_axis

KERNELS = Kernels(attention=sdpa_attention)

B, S, D, F_ = 2, 8, 12, 16
KERNEL = Linear(F.linear)
"""As one that torch has no part in: collectives are around it."""


class Mlp(nn.Module):
    """Column and row, whose bias is added to the cut stream."""

    def __init__(self, tp: AxisGroup, sequence: bool, ordered: bool = True, how: Linear = PLAIN_LINEAR) -> None:
        super().__init__()
        shared: dict[str, Any] = {"tp": tp, "sequence": sequence, "ordered": ordered, "how": how}
        self.up = ColumnParallelLinear(D, F_, bias=True, init_std=1.0, **shared)
        self.down = RowParallelLinear(F_, D, bias=True, init_std=1.0, **shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


LAYERS: dict[str, Callable[[AxisGroup, bool], nn.Module]] = {
    "column and row": Mlp,
    "column and row, in no order": partial(Mlp, ordered=False),
    "the same by a kernel": partial(Mlp, ordered=False, how=KERNEL),
    "replicated": lambda tp, sequence: ReplicatedLinear(D, 5, tp=tp, bias=True, init_std=1.0, sequence=sequence),
    "layernorm": lambda tp, sequence: LayerNorm(D, KERNELS, eps=1e-5, bias=True, tp=tp, sequence=sequence),
    "rmsnorm": lambda tp, sequence: RMSNorm(D, KERNELS, eps=1e-5, tp=tp, sequence=sequence),
}


def fill(module: nn.Module, tp: AxisGroup) -> None:
    with torch.no_grad():
        for parameter in name_parameters("layer", module):
            logical = logical_of(parameter)
            generator = torch.Generator().manual_seed(len(logical.name))
            parameter.copy_(logical.local_slice(torch.randn(logical.shape, generator=generator), tp.rank, tp.size))


def run(make: Callable[[AxisGroup, bool], nn.Module], size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output and input gradient of the whole stream, and the assembled gradient of each parameter."""
    x_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))

    def rank(tp: AxisGroup) -> tuple[Tensor, Tensor, list]:
        module = make(tp, size > 1)
        fill(module, tp)
        own = x_BSD.chunk(size, dim=1)[tp.rank].clone().requires_grad_()
        y = module(own)
        y.square().sum().backward()
        assert own.grad is not None
        return y.detach(), own.grad, [(logical_of(p), p.grad) for p in module.parameters()]

    outputs, inputs, parameters = zip(*on_axis(rank, size), strict=True)
    grads = {}
    for slices in zip(*parameters, strict=True):
        logical = slices[0][0]
        if logical.dim is None:
            # Summed over the parts, on all ranks.
            for _, other in slices[1:]:
                torch.testing.assert_close(other, slices[0][1], rtol=0, atol=0)
        grads[logical.name] = logical.assemble([grad for _, grad in slices])
    return torch.cat(outputs, dim=1), torch.cat(inputs, dim=1), grads


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_layers_on_a_cut_stream_are_those_on_the_whole(make: Callable[[AxisGroup, bool], nn.Module], size: int) -> None:
    output, grad, parameters = run(make, 1)
    cut_output, cut_grad, cut_parameters = run(make, size)
    # Sums in another order: fp32 rounding only.
    torch.testing.assert_close(cut_output, output, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cut_grad, grad, rtol=1e-5, atol=1e-3)
    assert cut_parameters.keys() == parameters.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(cut_parameters[name], value, rtol=1e-5, atol=1e-3, msg=name)


@pytest.mark.parametrize("size", [2, 4])
def test_a_replicated_layer_off_the_stream_has_its_whole_gradient_on_every_rank(size: int) -> None:
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(0))

    def rank(tp: AxisGroup) -> Tensor:
        layer = ReplicatedLinear(D, 2, tp=tp, bias=True, init_std=1.0, sequence=False)
        fill(layer, tp)
        layer(x).square().sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad

    (alone,) = on_axis(rank, 1)
    for mine in on_axis(rank, size):
        assert torch.equal(mine, alone)


@pytest.mark.parametrize(("heads", "kv", "size"), [(4, 4, 2), (4, 2, 2), (4, 1, 4), (8, 2, 4)])
def test_ulysses_turns_positions_into_heads_and_back(heads: int, kv: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q_BSNH = torch.randn(B, S, heads, 3, generator=generator)
    k_BSKH, v_BSKH = (torch.randn(B, S, kv, 3, generator=generator) for _ in range(2))

    def rank(cp: AxisGroup) -> tuple[Tensor, ...]:
        mine = [x.chunk(size, dim=1)[cp.rank].clone().requires_grad_() for x in (q_BSNH, k_BSKH, v_BSKH)]
        q, k, v = to_heads(*mine, cp)
        assert q.shape == (B, S, heads // size, 3)
        assert k.shape == v.shape == (B, S, max(1, kv // size), 3)
        # Each query head stands beside the key and value head that it has in the whole.
        for local in range(q.shape[2]):
            head = cp.rank * q.shape[2] + local
            group, own = head * kv // heads, local * k.shape[2] // q.shape[2]
            assert torch.equal(q[:, :, local], q_BSNH[:, :, head])
            assert torch.equal(k[:, :, own], k_BSKH[:, :, group])
            assert torch.equal(v[:, :, own], v_BSKH[:, :, group])
        back = to_positions(q, cp)
        assert torch.equal(back, mine[0])
        (q.sum() + k.sum() + v.sum()).backward()
        return tuple(x.grad for x in mine if x.grad is not None)

    for q_grad, k_grad, v_grad in on_axis(rank, size):
        copies = max(1, size // kv)
        assert torch.equal(q_grad, torch.ones_like(q_grad))
        assert torch.equal(k_grad, torch.full_like(k_grad, copies))
        assert torch.equal(v_grad, torch.full_like(v_grad, copies))
