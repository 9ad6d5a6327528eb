"""AdamW (arXiv 1711.05101, algorithm 2) over flat state, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2048
"""Elements whose squares one entry of `partial_square` sums. The Triton kernel has one program for each."""


def partial_square_length(n: int) -> int:
    """Entries of `partial_square` for `n` elements."""
    return -(-n // BLOCK)


def rounding_salt(step: int) -> int:
    """int32 that the rounding of bf16 state depends on beside the place of an element."""
    return _signed(step * 0x85EBCA77 + 0x165667B1)


def _signed(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def random_bits(n: int, salt: int, device: torch.device) -> Tensor:
    """int32 (n,): the last steps of MurmurHash3 (32 bits) over the place of each element."""

    def times(x: Tensor, factor: int) -> Tensor:
        return (x * factor).bitwise_and(0xFFFFFFFF)

    x = times(torch.arange(n, device=device), 0x9E3779B1) ^ (salt % 2**32)
    x = times(x ^ (x >> 16), 0x85EBCA6B)
    x = times(x ^ (x >> 13), 0xC2B2AE35)
    x = x ^ (x >> 16)
    return (x - (x >> 31) * 2**32).int()


def round_by_chance(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 (n,) in bf16, rounded up with the chance that brings the mean of many to `x` (arXiv 2010.06192).

    Args:
        bits: int32 (n,), 16 random bits each.
    """
    raw = x.view(torch.int32)
    moved = torch.where(x.isfinite(), raw + bits, raw) & -65536
    return torch.where(x.isnan(), x, moved.view(torch.float32)).bfloat16()


def _stepped(
    weights: Tensor,
    mean: Tensor,
    square: Tensor,
    gradient: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    beta1, beta2 = betas
    mean = mean.lerp(gradient, 1 - beta1)
    square = (square * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    moved = (weights * (1 - lr * weight_decay)).addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
    return moved, mean, square


def _in_bf16(moved: Tensor, mean: Tensor, square: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    bits = random_bits(moved.numel(), rounding_salt(step), moved.device)
    first, second, third = (
        round_by_chance(x, (bits >> shift) & 0xFFFF) for x, shift in ((moved, 0), (mean, 8), (square, 16))
    )
    return first, second, third


def check_adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None,
    copy_out: Tensor | None,
    partial_square: Tensor | None,
) -> None:
    """Refuse what no implementation of `adamw_step` takes, with a ValueError."""
    for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not number >= 0.0:
            raise ValueError(f"{name}={number} must not be negative")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")
    if step < 1:
        raise ValueError(f"step={step} must be at least 1: steps are counted from 1")
    if parameter.dim() != 1:
        raise ValueError(f"parameter of shape {tuple(parameter.shape)} must be flat, (n,)")
    written = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "copy_out": copy_out}
    for name, tensor in {"gradient": gradient, **written}.items():
        if tensor is not None and tensor.shape != parameter.shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} must have parameter's, {tuple(parameter.shape)}")
    if grad_scale is not None and grad_scale.numel() != 1:
        raise ValueError(f"grad_scale of shape {tuple(grad_scale.shape)} must be one number")
    blocks = partial_square_length(parameter.numel())
    if partial_square is not None and tuple(partial_square.shape) != (blocks,):
        raise ValueError(
            f"partial_square of shape {tuple(partial_square.shape)} must be ({blocks},), "
            f"one entry for each {BLOCK} elements"
        )
    for name, tensor in {"parameter": parameter, **written, "partial_square": partial_square}.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} with strides {tensor.stride()} must be contiguous: it is written in place")
    others = {"gradient": gradient, **written, "grad_scale": grad_scale, "partial_square": partial_square}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != parameter.device:
            raise ValueError(f"{name} on {tensor.device} must lie beside parameter, on {parameter.device}")


@torch.no_grad()
def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
    copy_out: Tensor | None = None,
    partial_square: Tensor | None = None,
) -> None:
    """One step of AdamW in place, as torch.optim.AdamW makes it.

    g <- grad_scale g; m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
    w <- w - lr weight_decay w - lr / (1 - b1^step) m / (sqrt(v / (1 - b2^step)) + eps).

    bf16 state is computed in fp32 and rounded by chance, since steps are often smaller than half of what bf16
    can tell apart, and would be lost.

    Args:
        parameter, exp_avg, exp_avg_sq: w, m and v, (n,), contiguous, of one floating dtype.
        gradient: g, (n,), any floating dtype and stride.
        lr, eps, weight_decay: not negative.
        betas: b1 and b2, in [0, 1).
        step: number of this step, from 1; the corrections for bias are computed from it in fp64.
        grad_scale: one number on the device that multiplies the gradients before anything else. NaN drops the step:
            no tensor changes, and nobody waits for the device. The caller's count of steps goes on.
        copy_out: (n,), another floating dtype; receives the new parameters, rounded.
        partial_square: fp32 (partial_square_length(n),); receives the sums of squares of the gradients of each
            block, before `grad_scale`. Those of a dropped step are not written.

    Raises:
        ValueError: a number is out of range; shapes, strides or devices do not fit.
    """
    check_adamw(
        parameter, gradient, exp_avg, exp_avg_sq, lr, betas, eps, weight_decay, step, grad_scale, copy_out,
        partial_square,
    )  # fmt: skip
    raw = gradient.to(torch.promote_types(parameter.dtype, torch.float32))
    keep = torch.ones((), dtype=torch.bool, device=parameter.device)
    scaled = raw
    if grad_scale is not None:
        factor = grad_scale.reshape(())
        keep, scaled = ~factor.isnan(), raw * factor.to(raw.dtype)
    weights, mean, square = (x.to(raw.dtype) for x in (parameter, exp_avg, exp_avg_sq))
    moved, mean, square = _stepped(weights, mean, square, scaled, lr, betas, eps, weight_decay, step)
    if parameter.dtype is torch.bfloat16:
        moved, mean, square = _in_bf16(moved, mean, square, step)
    for old, new in ((parameter, moved), (exp_avg, mean), (exp_avg_sq, square)):
        old.copy_(torch.where(keep, new, old))
    if copy_out is not None:
        copy_out.copy_(torch.where(keep, parameter.to(copy_out.dtype), copy_out))
    if partial_square is not None:
        padded = torch.nn.functional.pad(raw, (0, partial_square.numel() * BLOCK - raw.numel()))
        sums = padded.view(-1, BLOCK).square().sum(1).to(partial_square.dtype)
        partial_square.copy_(torch.where(keep, sums, partial_square))
