"""AdamW (arXiv 1711.05101, algorithm 2) over flat fp32 state: every tensor is read and written once.

Consecutive threads hold four consecutive elements, which is 16 bytes of fp32 and 8 bytes of a 16-bit dtype, and each
thread has two of these from every tensor: six to eight loads are under way before the first use.
"""

# Arguments of kernels have types that no annotation says.
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.interpreter import require_gpu
from engine_kernels.reference.adamw import BLOCK, check_adamw, partial_square_length, rounding_salt

__all__ = ["adamw_step", "partial_square_length"]

_NUM_WARPS = 8
_EVICT = tl.constexpr("evict_first")
"""State is used once a step, and is larger than any cache."""
_TINY = tl.constexpr(2.0**-64)


@triton.jit
def _moments(mean, square, g, beta1, weight1, beta2, weight2, SHORT1: tl.constexpr, SHORT2: tl.constexpr):
    """Both moments with the gradient in them.

    m + (1 - b) (g - m) errs by its last rounding alone, where b m would add the rounding of b, the same in every step
    of a long memory. A short memory has nothing to add up, and its difference could cancel.
    """
    mean = tl.fma(mean, beta1, g * weight1) if SHORT1 else tl.fma(g - mean, weight1, mean)
    if SHORT2:
        square = tl.fma(square, beta2, g * g * weight2)
    else:
        # Infinite stays infinite, as in a sum, and its element at rest; the difference would be NaN.
        blown = square == float("inf")
        square = tl.where(blown, tl.fma(g, g, square), tl.fma(tl.fma(g, g, -square), weight2, square))
    return mean, square


@triton.jit
def _root(x):
    """The square root in one approximate instruction, which takes denormal numbers for zero: they are lifted before.

    The exact instruction calls a subroutine for zeros, which is what unused rows of an embedding hold.
    """
    tiny = x < _TINY
    return tl.sqrt(tl.where(tiny, x * 2.0**64, x)) * tl.where(tiny, 2.0**-32, 1.0)


@triton.jit
def random_bits(index, salt):
    """int32 of which all bits look random: as `engine_kernels.reference.adamw.random_bits`."""
    x = (index * -1640531535) ^ salt
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _rounded(x, bits, DTYPE: tl.constexpr):
    """fp32 `x` in DTYPE; in bf16 rounded up with the chance that `bits` (16 of them, int32) give, for the same mean."""
    if tl.bfloat16 == DTYPE:
        raw = x.to(tl.int32, bitcast=True)
        # What is not finite has no neighbour to be rounded to.
        moved = tl.where((raw & 0x7F800000) == 0x7F800000, raw, raw + bits) & -65536
        x = tl.where(x == x, moved.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def _adamw_block(
    parameter, gradient, exp_avg, exp_avg_sq, grad_scale, copy_out, partial_square, inside, first, salt,
    decay, step_size, root_scale, eps, beta1, weight1, beta2, weight2,
    BLOCK: tl.constexpr, SHORT1: tl.constexpr, SHORT2: tl.constexpr,
):  # fmt: skip
    """The elements from the pointers on where `inside` holds."""
    # Four elements of a thread in every dtype: eight of 16 bits would tear the vectors of fp32 apart.
    lanes = tl.max_contiguous(tl.arange(0, BLOCK), [4])
    g = tl.load(gradient + lanes, mask=inside, other=0.0, eviction_policy=_EVICT).to(tl.float32)
    w = tl.load(parameter + lanes, mask=inside, eviction_policy=_EVICT).to(tl.float32)
    mean = tl.load(exp_avg + lanes, mask=inside, eviction_policy=_EVICT).to(tl.float32)
    square = tl.load(exp_avg_sq + lanes, mask=inside, eviction_policy=_EVICT).to(tl.float32)
    keep = True
    if grad_scale is not None:
        factor = tl.load(grad_scale)
        keep = factor == factor
        # Spread before it is compared: the interpreter cannot spread a comparison.
        factor = tl.broadcast_to(factor, [BLOCK])
        inside = inside & (factor == factor)
    if partial_square is not None:
        tl.store(partial_square, tl.sum(g * g), mask=keep)
    if grad_scale is not None:
        g = g * factor
    mean, square = _moments(mean, square, g, beta1, weight1, beta2, weight2, SHORT1, SHORT2)
    ratio = mean / tl.fma(_root(square), root_scale, eps)
    w = w - tl.fma(w, decay, ratio * step_size)
    STATE: tl.constexpr = parameter.dtype.element_ty
    bits = tl.zeros([BLOCK], tl.int32)
    if tl.bfloat16 == STATE:
        bits = random_bits(first + lanes, salt)
    tl.store(parameter + lanes, _rounded(w, bits & 0xFFFF, STATE), mask=inside, eviction_policy=_EVICT)
    mean = _rounded(mean, (bits >> 8) & 0xFFFF, STATE)
    tl.store(exp_avg + lanes, mean, mask=inside, eviction_policy=_EVICT)
    square = _rounded(square, (bits >> 16) & 0xFFFF, STATE)
    tl.store(exp_avg_sq + lanes, square, mask=inside, eviction_policy=_EVICT)
    if copy_out is not None:
        tl.store(copy_out + lanes, w.to(copy_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "salt"])
def _adamw_kernel(
    parameter, gradient, exp_avg, exp_avg_sq, grad_scale, copy_out, partial_square, n, salt,
    decay, step_size, root_scale, eps, beta1, weight1, beta2, weight2,
    BLOCK: tl.constexpr, SHORT1: tl.constexpr, SHORT2: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    parameter += start
    gradient += start
    exp_avg += start
    exp_avg_sq += start
    if copy_out is not None:
        copy_out += start
    if partial_square is not None:
        partial_square += tl.program_id(0)
    # A mask that depends on n would cost the whole blocks their vectors.
    if start + BLOCK <= n:
        inside = tl.full([BLOCK], True, tl.int1)
        _adamw_block(
            parameter, gradient, exp_avg, exp_avg_sq, grad_scale, copy_out, partial_square, inside, start.to(tl.int32),
            salt, decay, step_size, root_scale, eps, beta1, weight1, beta2, weight2, BLOCK, SHORT1, SHORT2,
        )  # fmt: skip
    else:
        inside = tl.arange(0, BLOCK) < n - start
        _adamw_block(
            parameter, gradient, exp_avg, exp_avg_sq, grad_scale, copy_out, partial_square, inside, start.to(tl.int32),
            salt, decay, step_size, root_scale, eps, beta1, weight1, beta2, weight2, BLOCK, SHORT1, SHORT2,
        )  # fmt: skip


@torch.library.custom_op(
    "octant::adamw_step", mutates_args=("parameter", "exp_avg", "exp_avg_sq", "copy_out", "partial_square")
)
def _adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_scale: Tensor | None,
    copy_out: Tensor | None,
    partial_square: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    n = parameter.numel()
    if n == 0:
        return
    with torch.cuda.device_of(parameter):
        _adamw_kernel[(partial_square_length(n),)](
            parameter,
            gradient.contiguous(),
            exp_avg,
            exp_avg_sq,
            grad_scale,
            copy_out,
            partial_square,
            n,
            rounding_salt(step),
            lr * weight_decay,
            lr / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step),
            eps,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            BLOCK=BLOCK,
            SHORT1=beta1 < 0.5,
            SHORT2=beta2 < 0.5,
            num_warps=_NUM_WARPS,
        )


@_adamw.register_fake
def _(*_: Tensor | float | None) -> None:
    return None


def _check_for_triton(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_scale: Tensor | None,
    copy_out: Tensor | None,
    partial_square: Tensor | None,
) -> None:
    halves = (torch.bfloat16, torch.float16)
    single, states = (torch.float32,), (torch.float32, torch.bfloat16)
    for name, tensor, dtypes in (
        ("parameter", parameter, states),
        ("exp_avg", exp_avg, (parameter.dtype,)),
        ("exp_avg_sq", exp_avg_sq, (parameter.dtype,)),
        ("gradient", gradient, (*single, *halves)),
        ("grad_scale", grad_scale, single),
        ("copy_out", copy_out, halves),
        ("partial_square", partial_square, single),
    ):
        if tensor is not None and tensor.dtype not in dtypes:
            raise ValueError(f"{name} in {tensor.dtype} must be in {' or '.join(map(str, dtypes))}")
    require_gpu("parameter", parameter)


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
    """One step of AdamW in place, as torch.optim.AdamW makes it, in one pass over memory and in fp32.

    The formula, and what is not said here, stand at `engine_kernels.reference.adamw.adamw_step`. A gradient beyond
    1.8e19 has an infinite square, which leaves its element at rest.

    Args:
        parameter, exp_avg, exp_avg_sq: (n,), all fp32 or all bf16, contiguous; n may pass 2^31. Fastest where their
            addresses, and those of `gradient` and `copy_out`, are multiples of 16 bytes.
        gradient: (n,), fp32, bf16 or fp16; copied where it is not contiguous.
        lr, eps, weight_decay: not negative.
        betas: in [0, 1).
        step: number of this step, from 1.
        grad_scale: fp32, one number. NaN drops the step: no tensor changes.
        copy_out: (n,), bf16 or fp16, contiguous; receives the new parameters, rounded to nearest.
        partial_square: fp32 (partial_square_length(n),); receives the sums of squares of the gradients of each
            block, before `grad_scale`.

    Raises:
        ValueError: a number is out of range; shapes, strides, dtypes or devices do not fit.
    """
    check_adamw(
        parameter, gradient, exp_avg, exp_avg_sq, lr, betas, eps, weight_decay, step, grad_scale, copy_out,
        partial_square,
    )  # fmt: skip
    _check_for_triton(parameter, gradient, exp_avg, exp_avg_sq, grad_scale, copy_out, partial_square)
    _adamw(
        parameter, gradient, exp_avg, exp_avg_sq, grad_scale, copy_out, partial_square, lr, *betas, eps,
        weight_decay, step,
    )  # fmt: skip
