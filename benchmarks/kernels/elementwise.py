"""Suite `elementwise`: operations bound by memory, in bytes over time next to a copy of as many bytes.

Bytes are the least that must move: each input that is needed read once, each output written once; weights of one row
are left out. Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim, R rows, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import elementwise_systems as peers
from benchmarks.kernels.contest import Bench, Case, Entrant, contest, differentiable, judge_by
from benchmarks.kernels.copying import COPY, copy_case, copy_entrant, write_of_copy

_LIMIT = 0.02
"""Relative error against fp32: operations of several steps round to bf16 after each in eager mode."""
EPS = 1e-5


@dataclass(frozen=True)
class Operation:
    """One operation on given inputs, those that want gradients first."""

    name: str
    eager: Callable[..., Any]
    inputs: Sequence[Tensor]
    differentiated: int
    """How many inputs want gradients."""
    outputs: Sequence[torch.Size]
    moved: tuple[int, int]
    """Elements of two bytes that must move forward and backward."""


def _rotate(x_BSNH: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Pairs (x_i, x_{i + H/2}) turned by their position's angle (RoFormer, arXiv 2104.09864)."""
    first, second = x_BSNH.float().chunk(2, dim=-1)
    cos, sin = cos_SR[None, :, None], sin_SR[None, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSNH.dtype)


def _rms_norm(x: Tensor, weight_D: Tensor) -> Tensor:
    return F.rms_norm(x, weight_D.shape, weight_D, EPS)


def _rms_norm_residual(x: Tensor, residual: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight_D), total


def _layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor) -> Tensor:
    return F.layer_norm(x, weight_D.shape, weight_D, bias_D, EPS)


def _rotate_qk(q: Tensor, k: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos_SR, sin_SR), _rotate(k, cos_SR, sin_SR)


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def _gelu_bias(h: Tensor, bias_F: Tensor) -> Tensor:
    return F.gelu(h + bias_F, approximate="tanh")


def operations(device: torch.device, quick: bool) -> Iterator[Operation]:
    """The most important first; each one's inputs are made when it is asked for."""
    rows, hidden, ffn_rows, gated, ffn = (8, 32, 8, 24, 32) if quick else (32768, 4096, 8192, 14336, 16384)
    batch, length, heads, kv_heads, dim = (1, 6, 4, 2, 16) if quick else (4, 8192, 32, 8, 128)
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    size, shape = rows * hidden, torch.Size((rows, hidden))
    yield Operation(
        "rms_norm residual",
        _rms_norm_residual,
        [draw(shape), draw(shape), draw(hidden)],
        3,
        [shape] * 2,
        (4 * size,) * 2,
    )
    yield Operation("rms_norm", _rms_norm, [draw(shape), draw(hidden)], 2, [shape], (2 * size, 3 * size))
    out = torch.Size((ffn_rows, gated))
    yield Operation("swiglu", _swiglu, [draw(ffn_rows, 2 * gated)], 1, [out], (3 * out.numel(), 5 * out.numel()))
    q, k = draw(batch, length, heads, dim), draw(batch, length, kv_heads, dim)
    angles = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, dim, 2) / dim)).to(device)
    both = q.numel() + k.numel()
    yield Operation("rotate_qk", _rotate_qk, [q, k, angles.cos(), angles.sin()], 2, [q.shape, k.shape], (2 * both,) * 2)
    del q, k
    weights = [draw(hidden), draw(hidden)]
    yield Operation("layer_norm", _layer_norm, [draw(shape), *weights], 3, [shape], (2 * size, 3 * size))
    out = torch.Size((ffn_rows, ffn))
    yield Operation("gelu_bias", _gelu_bias, [draw(out), draw(ffn)], 2, [out], (2 * out.numel(), 3 * out.numel()))


def run(bench: Bench) -> None:
    """The copy of 2 GiB, then all operations, until the time is over."""
    count = float(2**20 if bench.quick else 4 * 2**30)
    large = Case(f"copy of {count / 2**31:.2g} GiB", {COPY: count}, "gb_per_s", {"suite": "elementwise"}, lambda _: {})
    contest(bench, large, {COPY: partial(copy_entrant, bench.device, large.work)}, 8)
    for number, operation in enumerate(operations(bench.device, bench.quick)):
        if bench.budget.over():
            print(f"elementwise: out of time at {operation.name}", flush=True)
            return
        grads = [torch.randn(size, device=bench.device, dtype=torch.bfloat16) for size in operation.outputs]
        case = _case(operation, grads)
        makers: dict[str, Callable[[], Entrant]] = {COPY: partial(copy_entrant, bench.device, case.work)}
        for name, build in peers.systems(operation.name, operation.eager, bench.device).items():
            makers[name] = partial(_entrant, build, operation, grads)
        times = contest(bench, case, makers, 6 - number, {COPY: copy_case(case)})
        write_of_copy(bench, case, times)


def _case(operation: Operation, grads: Sequence[Tensor]) -> Case:
    exact = differentiable(operation.eager, _leaves(operation, torch.float32), [grad.float() for grad in grads])
    facts = {"suite": "elementwise", "shapes": [list(x.shape) for x in operation.inputs]}
    work = dict(zip(("fwd", "bwd"), (2.0 * elements for elements in operation.moved), strict=True))
    return Case(operation.name, work, "gb_per_s", facts, judge_by(exact.results, _LIMIT))


def _leaves(operation: Operation, dtype: torch.dtype) -> list[Tensor]:
    """Copies of the inputs: some systems write into what they read."""
    return [
        x.detach().to(dtype, copy=True).requires_grad_() if number < operation.differentiated else x
        for number, x in enumerate(operation.inputs)
    ]


def _entrant(build: Callable[[], Callable[..., Any]], operation: Operation, grads: Sequence[Tensor]) -> Entrant:
    return differentiable(build(), _leaves(operation, torch.bfloat16), [grad.clone() for grad in grads])
