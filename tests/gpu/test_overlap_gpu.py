"""Split linear layers over NCCL and over symmetric memory: fp32, bf16 and compiled, against layers that are not cut."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.enums import TpOverlap
from engine.dist.context import AxisGroup
from tests.helpers.ranks import backend_of, run_ranks
from tests.ranks.test_overlap import axis_of, compare, draw, mlp, unordered

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HOW: tuple[TpOverlap, ...] = (TpOverlap.none, TpOverlap.symmetric)
if torch.cuda.device_count() > 1:
    # Sends over NCCL.
    HOW = (*HOW, TpOverlap.chunked)


def precise() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for how in HOW:
        for sequence in (True, False):
            for dtype in (torch.float64, torch.float32):
                for batch, run in product((1, 3), (mlp, unordered)):
                    compare(how, batch, sequence, run, dtype)


def compiled() -> None:
    for how in HOW:
        for sequence in (True, False):
            for run in (mlp, unordered):
                torch._dynamo.reset()
                compare(how, 2, sequence, run, torch.float32, partial(torch.compile, fullgraph=True))


def gradients(axis: AxisGroup, sequence: bool, dtype: torch.dtype) -> list[Tensor]:
    """Of a layer wide and long enough for several tiles, four times, so that buffers are used again; in fp64."""

    def mine(x: Tensor, dim: int) -> Tensor:
        return x.chunk(axis.size, dim)[axis.rank].clone().to(dtype).requires_grad_()

    x, weight, up, down = draw(1, 2, 4096, 512), draw(2, 2, 4096, 512), draw(3, 1024, 512), draw(4, 512, 1024)
    bias, gain = draw(5, 1024).to(dtype), torch.ones(512, device=x.device, dtype=dtype)
    x = mine(x, 1) if sequence else x.to(dtype).requires_grad_()
    up, down, bias = mine(up / 32, 0), mine(down / 32, 1), bias.chunk(axis.size)[axis.rank]
    weight = (weight.chunk(axis.size, 1)[axis.rank] if sequence else weight).to(dtype)
    for _ in range(4):
        x.grad = up.grad = down.grad = None
        inner = torch.nn.functional.silu(mlp(x, up, bias, down, gain, axis, sequence))
        (inner * weight).sum().backward()
    return [t.grad.double() for t in (x, up, down) if t.grad is not None]


def half() -> None:
    """Errors in bf16 are at most twice those of layers that are not cut."""
    alone = AxisGroup(rank=0, size=1, ranks=(0,), group=None)
    exact, plain = gradients(alone, False, torch.float64), gradients(alone, False, torch.bfloat16)
    limits = [2 * float((p - e).norm() / e.norm()) for p, e in zip(plain, exact, strict=True)]
    for how in HOW:
        axis = axis_of(how)
        for sequence in (True, False):
            found = gradients(axis, sequence, torch.bfloat16)
            for got, want, dim, limit in zip(found, exact, (1 if sequence else None, 0, 1), limits, strict=True):
                want = want if dim is None else want.chunk(axis.size, dim)[axis.rank]
                error = float((got - want).norm() / want.norm())
                assert error <= limit, (how, sequence, dim, error, limit, dist.get_rank())


@pytest.mark.parametrize("body", [precise, half, compiled], ids=lambda body: body.__name__)
def test_two_gpus_have_the_gradients_of_whole_layers(body: object) -> None:
    run_ranks(body, 2, backend=backend_of("cuda", 2), timeout_s=280)
