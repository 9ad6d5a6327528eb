"""Inputs and measures of the fused loss, torch's own loss next to it, and what an operation allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine_kernels.reference.linear_cross_entropy import linear_cross_entropy as reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALL: dict[str, Any] = {"smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.5}
NAMES = ("loss", "x", "weight", "bias")


def draw(
    device: torch.device, shape: tuple[int, int, int], vocab_size: int, dtype: torch.dtype, *, bias: bool = False
) -> tuple[list[Tensor], Tensor]:
    """x (T, D), weight (V, D) and, if asked for, bias (V,), for logits of a few units; labels, a fifth ignored."""
    tokens, width, entries = shape
    seed = torch.Generator().manual_seed(sum(shape))
    values = [torch.randn(tokens, width, generator=seed), 3 * torch.randn(entries, width, generator=seed) / width**0.5]
    values += [torch.randn(entries, generator=seed)] if bias else []
    labels = torch.randint(0, vocab_size, (tokens,), generator=seed)
    labels[4::5] = -100
    return [v.to(device, dtype) for v in values], labels.to(device)


def measure(
    function: Callable[..., Tensor], values: list[Tensor], labels: Tensor, upstream: float = 1.0, **options: Any
) -> list[Tensor]:
    """Loss, and gradients of `upstream` times the loss."""
    leaves = [v.detach().requires_grad_() for v in values]
    options = {"divisor": torch.tensor(17.0, device=labels.device), **options}
    loss = function(*leaves[:2], labels, bias_V=(*leaves, None)[2], **options)
    return [loss.detach(), *torch.autograd.grad(upstream * loss, leaves)]


def unfused(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias_V: Tensor | None,
    divisor: Tensor,
    vocab_size: int,
    logit_scale: float = 1.0,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """torch's own operations, with the logits in full."""
    logits = F.linear(x, weight).float() * logit_scale
    logits = (logits if bias_V is None else logits + bias_V)[:, :vocab_size]
    total = (
        F.cross_entropy(logits, labels, ignore_index=ignore_index, label_smoothing=smoothing, reduction="sum")
        + z_loss * torch.logsumexp(logits, -1)[labels != ignore_index].square().sum()
    )
    return total / divisor


def exact(values: list[Tensor], labels: Tensor, upstream: float = 1.0, **options: Any) -> list[Tensor]:
    return measure(reference, [v.double() for v in values], labels, upstream, **options)


class Allocations(TorchDispatchMode):
    """Elements of every floating tensor that is made, inside the given operators too."""

    def __init__(self, *inside: Any) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.inside = {operator._opoverload: operator._init_fn for operator in inside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.inside:
            with self:
                return self.inside[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given]
        self.sizes += [t.numel() for t in new if t.dtype.is_floating_point]
        return out
