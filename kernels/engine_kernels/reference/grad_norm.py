"""The norm of gradients, clipping by it (arXiv 1211.5063, algorithm 1) and scaling, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensors(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors that are not of floating dtypes or lie on several devices, with a ValueError."""
    for i, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            raise ValueError(f"tensors[{i}] in {tensor.dtype} must be in a floating dtype")
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors[{i}] on {tensor.device} must lie beside tensors[0], on {tensors[0].device}")


def check_factor(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Refuse a factor that is not one number beside the tensors, with a ValueError."""
    if factor.numel() != 1:
        raise ValueError(f"factor of shape {tuple(factor.shape)} must be one number")
    if tensors and factor.device != tensors[0].device:
        raise ValueError(f"factor on {factor.device} must lie beside the tensors, on {tensors[0].device}")


def check_clip(norm: Tensor, max_norm: float) -> None:
    """Refuse a norm that is not one floating number and a limit that is not positive, with a ValueError."""
    if norm.numel() != 1 or not norm.is_floating_point():
        raise ValueError(f"norm of shape {tuple(norm.shape)} in {norm.dtype} must be one floating number")
    if not max_norm > 0.0:
        raise ValueError(f"max_norm={max_norm} must be positive")


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements of all tensors, in fp64.

    Args:
        tensors: any shapes and strides, floating dtypes, on one device. None at all have a sum of 0.

    Returns:
        fp64 scalar on their device; NaN and infinity where the tensors hold them.

    Raises:
        ValueError: other dtypes; several devices.
    """
    check_tensors(tensors)
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply the tensors by `factor` in place, in at least fp32, and round each product once.

    Args:
        tensors: any shapes and strides, floating dtypes, on one device.
        factor: one number beside them; NaN makes every element NaN.

    Raises:
        ValueError: other dtypes; several devices; `factor` is not one number.
    """
    check_tensors(tensors)
    check_factor(tensors, factor)
    for tensor in tensors:
        working = torch.promote_types(tensor.dtype, torch.float32)
        tensor.copy_(tensor.to(working) * factor.reshape(()).to(working))


@torch.no_grad()
def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients with this norm are multiplied by so that their norm is at most `max_norm`.

    min(1, max_norm / (norm + 1e-6)) as in torch.nn.utils.clip_grad_norm_; NaN where the norm is not finite, so that a
    step that is given it is dropped on the device.

    Args:
        norm: one floating number.
        max_norm: positive.

    Returns:
        fp32 scalar on the device of `norm`; nobody waits for it.

    Raises:
        ValueError: `norm` is not one floating number; `max_norm` is not positive.
    """
    check_clip(norm, max_norm)
    exact = norm.reshape(()).double()
    factor = torch.where(exact.isfinite(), max_norm / (exact + 1e-6), torch.nan)
    return factor.clamp(max=1.0).float()
