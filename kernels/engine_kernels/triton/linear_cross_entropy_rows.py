"""Passes over rows of logits: statistics of the softmax, then the loss and the logits' gradient in their place.

A row is as wide as the vocabulary and does not fit into the registers of a block: it is read twice, the second time
from its end, where the first pass has just been, so that most of it still stands in the L2 cache. A block works on one
row in tiles of VECTORS vectors of INNER neighbours, 16 bytes each, which one thread holds together: maxima and sums of
a vector take no exchange between threads, and those of the row one at its end.
"""

# ruff: noqa: ANN001, ANN202 -- the arguments of kernels have types that Triton finds out.

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16
TILE_VECTORS = 1024
VECTORS_PER_THREAD = 2
"""With 16 warps two blocks share a multiprocessor, and their rows, half read on average, fit into the L2 cache."""
SCALE_BLOCK = 4096
SCALE_WARPS = 8
SCALE_PROGRAMS = 1056
"""Eight for each of 132 multiprocessors: where the factor is 1, the kernel takes no longer than their start."""

_LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Largest logit of no logits: finite, so that differences to it are not NaN."""
_STATISTICS = tl.constexpr(4)
"""Of a row on one rank: largest logit, sum of exp(z - largest), target logit or 0, sum of logits."""


@triton.jit
def _tile(row, bias, start, width, columns, scale, EVICT: tl.constexpr, VECTORS: tl.constexpr, INNER: tl.constexpr):
    """Column numbers of a tile and its logits in fp32; -inf past the vocabulary, whatever stands there."""
    at = start + tl.arange(0, VECTORS)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    inside = at < width
    z = tl.load(row + at, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32) * scale
    if bias is not None:
        z += tl.load(bias + at, mask=inside, other=0.0)
    return at, tl.where(at < columns, z, float("-inf"))


@triton.jit
def _statistics(row, bias, width, columns, scale, SMOOTH: tl.constexpr, VECTORS: tl.constexpr, INNER: tl.constexpr):
    """Largest logit, sum of exp(z - largest) and, where SMOOTH, sum of the logits of a row, in one pass.

    A NaN is no maximum, but makes the sum NaN.
    """
    largest = tl.full([VECTORS], _LOWEST, tl.float32)
    total = tl.zeros([VECTORS], tl.float32)
    plain = tl.zeros([VECTORS], tl.float32)
    for start in tl.range(0, width, VECTORS * INNER):
        at, z = _tile(row, bias, start, width, columns, scale, "evict_last", VECTORS, INNER)
        top = tl.maximum(largest, tl.max(z, axis=1))
        total = total * tl.exp(largest - top) + tl.sum(tl.exp(z - top[:, None]), axis=1)
        largest = top
        if SMOOTH:
            plain += tl.sum(tl.where(at < columns, z, 0.0), axis=1)
    top = tl.max(largest, axis=0)
    total_row = tl.sum(total * tl.exp(largest - top), axis=0)
    plain_row = 0.0
    if SMOOTH:
        plain_row = tl.sum(plain, axis=0)
    return top, total_row, plain_row


@triton.jit
def _target(row, bias, label, columns, scale):
    """The logit of column `label` in fp32, 0 where the row has no such column."""
    here = (label >= 0) & (label < columns)
    z = tl.load(row + label, mask=here, other=0.0).to(tl.float32) * scale
    if bias is not None:
        z += tl.load(bias + label, mask=here, other=0.0)
    return z


@triton.jit
def _gradient(
    row, bias, label, width, columns, scale, largest, factor, onehot, even, VECTORS: tl.constexpr, INNER: tl.constexpr
):
    """Overwrite a row by factor * exp(z - largest) - onehot [v = label] - even; zeros past the vocabulary."""
    tiles = tl.cdiv(width, VECTORS * INNER)
    for i in tl.range(0, tiles):
        start = (tiles - 1 - i) * VECTORS * INNER
        at, z = _tile(row, bias, start, width, columns, scale, "evict_first", VECTORS, INNER)
        gradient = factor * tl.exp(z - largest) - even
        gradient = tl.where(at == label, gradient - onehot, gradient)
        gradient = tl.where(at < columns, gradient, 0.0)
        tl.store(row + at, gradient.to(row.dtype.element_ty), mask=at < width)


@triton.jit
def _zero(row, width, VECTORS: tl.constexpr, INNER: tl.constexpr):
    for start in tl.range(0, width, VECTORS * INNER):
        at = start + tl.arange(0, VECTORS)[:, None] * INNER + tl.arange(0, INNER)[None, :]
        tl.store(row + at, tl.zeros([VECTORS, INNER], row.dtype.element_ty), mask=at < width)


@triton.jit
def _finish(
    row, bias, loss, divisor, label, first, width, columns, vocab_size, scale, smoothing, z_loss,
    largest, total, target, plain, GRADIENT: tl.constexpr, VECTORS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Loss of a token from the statistics of its whole row, and the gradient of this rank's part of it."""
    known = tl.where((label >= 0) & (label < vocab_size), 1.0, float("nan"))
    partition = tl.log(total) + largest
    value = tl.log(total) + (1.0 - smoothing) * (largest - target) + smoothing * (largest - plain / vocab_size)
    tl.store(loss, (value + z_loss * partition * partition) * known)
    if GRADIENT:
        share = known / tl.load(divisor).to(tl.float32)
        factor = share * (1.0 + 2.0 * z_loss * partition) / total
        _gradient(
            row, bias, (label - first).to(tl.int32), width, columns, scale, largest, factor, share * (1.0 - smoothing),
            share * smoothing / vocab_size, VECTORS, INNER,
        )  # fmt: skip


@triton.jit
def _whole_kernel(
    logits, bias, labels, losses, divisor, stride, columns, vocab_size, scale, smoothing, z_loss, ignore_index,
    SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, VECTORS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A row for each program, where this rank holds the whole vocabulary."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    label = tl.load(labels + token)
    if label == ignore_index:
        tl.store(losses + token, 0.0)
        if GRADIENT:
            _zero(row, stride, VECTORS, INNER)
    else:
        # Read before the row is overwritten: the reductions of the statistics wait for all threads.
        target = _target(row, bias, label, columns, scale)
        largest, total, plain = _statistics(row, bias, stride, columns, scale, SMOOTH, VECTORS, INNER)
        _finish(
            row, bias, losses + token, divisor, label, 0, stride, columns, vocab_size, scale, smoothing, z_loss,
            largest, total, target, plain, GRADIENT, VECTORS, INNER,
        )  # fmt: skip


@triton.jit
def _statistics_kernel(
    logits, bias, labels, statistics, stride, columns, first, scale, ignore_index,
    SMOOTH: tl.constexpr, VECTORS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Statistics of this rank's part of a row for each program, fp32 (rows, 4)."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    label = tl.load(labels + token)
    if label != ignore_index:
        target = _target(row, bias, label - first, columns, scale)
        largest, total, plain = _statistics(row, bias, stride, columns, scale, SMOOTH, VECTORS, INNER)
        out = statistics + token * _STATISTICS
        tl.store(out, largest)
        tl.store(out + 1, total)
        tl.store(out + 2, target)
        tl.store(out + 3, plain)


@triton.jit
def _finish_kernel(
    logits, bias, labels, losses, divisor, gathered, tokens, ranks, stride, columns, first, vocab_size, scale,
    smoothing, z_loss, ignore_index,
    GRADIENT: tl.constexpr, RANKS: tl.constexpr, VECTORS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The second pass, with the statistics of all ranks, fp32 (ranks, rows, 4)."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    label = tl.load(labels + token)
    if label == ignore_index:
        tl.store(losses + token, 0.0)
        if GRADIENT:
            _zero(row, stride, VECTORS, INNER)
    else:
        lanes = tl.arange(0, RANKS)
        inside = lanes < ranks
        of_rank = gathered + (lanes * tokens + token) * _STATISTICS
        tops = tl.load(of_rank, mask=inside, other=_LOWEST)
        largest = tl.max(tops, axis=0)
        total = tl.sum(tl.load(of_rank + 1, mask=inside, other=0.0) * tl.exp(tops - largest), axis=0)
        target = tl.sum(tl.load(of_rank + 2, mask=inside, other=0.0), axis=0)
        plain = tl.sum(tl.load(of_rank + 3, mask=inside, other=0.0), axis=0)
        _finish(
            row, bias, losses + token, divisor, label, first, stride, columns, vocab_size, scale, smoothing, z_loss,
            largest, total, target, plain, GRADIENT, VECTORS, INNER,
        )  # fmt: skip


@triton.jit
def _scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """Multiply `n` elements in place by the number at `factor`, and touch nothing where it is 1."""
    number = tl.load(factor)
    if number != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            tl.store(x + at, (tl.load(x + at, mask=inside).to(tl.float32) * number).to(x.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the passes over rows of logits are launched with."""

    stride: int
    """Elements from row to row: a multiple of VECTOR_BYTES, for vectors and for cuBLAS."""
    inner: int
    """Elements in VECTOR_BYTES."""
    columns: int
    """Of this rank's part of the logical vocabulary."""
    first: int
    vocab_size: int
    scale: float
    smoothing: float
    z_loss: float
    ignore_index: int
    group: dist.ProcessGroup | None

    @property
    def _tile(self) -> dict[str, int]:
        vectors = min(TILE_VECTORS, triton.next_power_of_2(self.stride // self.inner))
        return {"VECTORS": vectors, "INNER": self.inner, "num_warps": max(1, vectors // (32 * VECTORS_PER_THREAD))}

    def run(
        self, logits: Tensor, bias: Tensor | None, labels: Tensor, divisor: Tensor, losses: Tensor, *, gradient: bool
    ) -> None:
        """Write the losses of the rows, fp32 (rows,), which are not divided.

        Args:
            logits: (rows, `stride`), before scale and bias. With `gradient` they are replaced by the gradient of the
                losses' sum, divided by `divisor`, with respect to logit * scale + bias; past the vocabulary by zeros.
            bias: fp32 (`stride`,) or None.
        """
        tokens = logits.shape[0]
        smooth, numbers = self.smoothing > 0.0, (self.scale, self.smoothing, self.z_loss, self.ignore_index)
        if self.group is None:
            _whole_kernel[(tokens,)](
                logits, bias, labels, losses, divisor, self.stride, self.columns, self.vocab_size, *numbers,
                SMOOTH=smooth, GRADIENT=gradient, **self._tile,
            )  # fmt: skip
            return
        # Zeros, because an ignored row writes none.
        own = logits.new_zeros((tokens, _STATISTICS.value), dtype=torch.float32)
        _statistics_kernel[(tokens,)](
            logits, bias, labels, own, self.stride, self.columns, self.first, self.scale, self.ignore_index,
            SMOOTH=smooth, **self._tile,
        )  # fmt: skip
        ranks = self.group.size()
        gathered = own.new_empty((ranks * tokens, _STATISTICS.value))
        dist.all_gather_into_tensor(gathered, own, group=self.group)
        _finish_kernel[(tokens,)](
            logits, bias, labels, losses, divisor, gathered, tokens, ranks, self.stride, self.columns, self.first,
            self.vocab_size, *numbers, GRADIENT=gradient, RANKS=triton.next_power_of_2(ranks), **self._tile,
        )  # fmt: skip


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """Multiply contiguous `x` by the one number of fp32 `factor`, which the host does not wait for."""
    programs = min(triton.cdiv(x.numel(), SCALE_BLOCK), SCALE_PROGRAMS)
    if programs:
        _scale_kernel[(programs,)](x, factor, x.numel(), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS)
