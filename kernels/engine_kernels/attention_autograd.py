"""What attention in two operations, one forward and one backward, shares whatever computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]


def gradients_like(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Contiguous tensors for the gradients of q, k and v, not filled."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def differentiate_by(forward: Any, backward: Callable[..., Gradients], tensors: int) -> None:
    """Make the custom operation `forward` differentiable.

    Args:
        forward: (q, k, v, *tensors, *options) -> (output, logarithms of the softmax's denominators).
        backward: (gradient of the output, q, k, v, *outputs, *tensors, *options) -> gradients of q, k and v.
        tensors: how many tensors, or None, follow v.
    """

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *others = inputs
        ctx.options = others[tensors:]
        ctx.save_for_backward(q, k, v, *output, *others[:tensors])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (tensors + len(ctx.options))
        if do is None:
            return (None, None, None, *nothing)
        return (*backward(do, *ctx.saved_tensors, *ctx.options), *nothing)

    forward.register_autograd(differentiate, setup_context=remember)
