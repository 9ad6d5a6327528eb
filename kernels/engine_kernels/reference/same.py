"""Refusals that several operations share: their tensors have one floating dtype and stand on one device."""

from __future__ import annotations

from torch import Tensor


def require_floating(name: str, x: Tensor) -> None:
    """Refuse integers, booleans and complex numbers.

    Raises:
        ValueError: `x` is no floating tensor.
    """
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}: must be floating")


def require_same(name: str, other: Tensor, of: str, x: Tensor) -> None:
    """Refuse an `other` whose dtype or device is not that of `x`, which the message calls `of`.

    Raises:
        ValueError: they differ.
    """
    if other.dtype != x.dtype:
        raise ValueError(f"{name} is {other.dtype}: must be of the dtype of {of}, {x.dtype}")
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device}: must be on the device of {of}, {x.device}")
