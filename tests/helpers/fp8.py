"""A linear layer in fp8 next to the exact one, and how far apart rounding may take them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine_kernels.reference.fp8_linear import E4M3, E5M2, scale_of

_UNIT = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Largest relative error of rounding to the nearest: half of the last of 3, or 2, stored bits."""
_SMALLEST = {E4M3: 2.0**-9, E5M2: 2.0**-16}
"""The smallest number, and the distance of those next to zero."""
_BF16 = 2.0**-8
"""bf16's rounding of the result is half of it; the rest is room for the sums in fp32."""

Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor]


def draw(
    rows: int, length: int, inner: int, outer: int, *, bias: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x (rows, length, inner), weight (outer, inner), bias or None, gradient of the output; bf16."""
    generator = torch.Generator().manual_seed(inner + length)
    shapes = [(rows, length, inner), (outer, inner), (outer,), (rows, length, outer)]
    sizes = [1.0, 0.02, 0.1, 1e-4]
    x, weight, b, grad = (
        (size * torch.randn(shape, generator=generator)).bfloat16().to(device)
        for size, shape in zip(sizes, shapes, strict=True)
    )
    return x, weight, b if bias else None, grad


def measure(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
) -> dict[str, Tensor]:
    """Output `y`, and gradients of `x`, `weight` and `bias` for the gradient `grad` of the output."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    y = function(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    grads = torch.autograd.grad(y, leaves, grad)
    return {"y": y.detach(), **dict(zip(("x", "weight", "bias"), grads, strict=False))}


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """The same in fp64."""
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, grad)]
    return measure(torch.nn.functional.linear, *wide)  # type: ignore[arg-type]


def error_bound(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """Largest possible error of each element of what `measure` finds with current tensorwise scaling.

    |a b - a8 b8| <= |a| e_b + e_a |b| + e_a e_b, summed as the products are, and the rounding of the result.
    """
    (x_, ex), (w_, ew), (g_, eg) = _and_error(x, E4M3), _and_error(weight, E4M3), _and_error(grad, E5M2)
    flat = [tensor.flatten(0, -2) for tensor in (x_, ex, g_, eg)]
    sums = {
        "y": x_ @ ew.t() + ex @ (w_ + ew).t(),
        "x": g_ @ ew + eg @ (w_ + ew),
        "weight": flat[2].t() @ flat[1] + flat[3].t() @ (flat[0] + flat[1]),
    }
    wanted = exact(x, weight, bias, grad)
    sums |= {"bias": 2 * g_.flatten(0, -2).sum(0) * _BF16} if bias is not None else {}
    return {name: bound + _BF16 * (wanted[name].abs() + bound) for name, bound in sums.items()}


def rms_bound(name: str) -> float:
    """Error of a product relative to its size, were the errors of its operands spread evenly up to their bounds."""
    first = _UNIT[E4M3 if name == "y" else E5M2]
    return math.hypot(first, _UNIT[E4M3]) / math.sqrt(3)


def _and_error(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Magnitudes, and how far rounding may move each."""
    size = x.double().abs()
    return size, torch.maximum(size * _UNIT[dtype], scale_of(x, dtype).double() * _SMALLEST[dtype] / 2)
