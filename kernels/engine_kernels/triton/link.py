"""What a message between devices does to one of them: it holds some multiprocessors for as long as the link takes.

So a rank that runs alone on a device shares it with its messages as it would with those of NCCL, whose kernels copy by
a fixed number of blocks of 512 threads.
"""

# Arguments of kernels have types that no annotation says.
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 24
"""Channels that NCCL has on GPUs with NVLink 4; a link is fitted with 2/3 to 4/3 of them."""
_NUM_WARPS = 16
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_FITTED_BYTES = 2**27


@triton.jit
def _link_gather_kernel(source, target, words, parts, rank, BLOCK: tl.constexpr):
    """A ring's parts one after the other; the own one is written beside the first that comes."""
    steps = parts - 1
    blocks = tl.cdiv(words, BLOCK)
    for number in range(tl.program_id(0), blocks * steps, tl.num_programs(0)):
        step = number // blocks
        index = (number - step * blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < words
        value = tl.load(source + index, mask=inside)
        part = (rank + 1 + step) % parts
        tl.store(target + part.to(tl.int64) * words + index, value, mask=inside)
        if step == 0:
            own = (rank + step) % parts
            tl.store(target + own.to(tl.int64) * words + index, value, mask=inside)


@triton.jit
def _link_reduce_kernel(source, own, target, count, parts, rank, factor, BLOCK: tl.constexpr):
    """Reads the part of a ring's step and the own one, and writes; the sum is the own part times `factor`."""
    steps = parts - 1
    blocks = tl.cdiv(count, BLOCK)
    for number in range(tl.program_id(0), blocks * steps, tl.num_programs(0)):
        step = number // blocks
        index = (number - step * blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < count
        part = (rank + 1 + step) % parts
        other = tl.load(source + part.to(tl.int64) * count + index, mask=inside)
        value = tl.load(own + index, mask=inside).to(tl.float32) * factor
        # What is not a number stays none, and the other part is read for it.
        value = tl.where(other == other, value, other.to(tl.float32))
        tl.store(target + index, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _link_scale_kernel(x, count, factor, BLOCK: tl.constexpr):
    blocks = tl.cdiv(count, BLOCK)
    for number in range(tl.program_id(0), blocks, tl.num_programs(0)):
        index = (number % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < count
        value = tl.load(x + index, mask=inside).to(tl.float32) * factor
        tl.store(x + index, value.to(x.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Link:
    """A link of a device. All tensors are dense; messages are launched on the current stream.

    Args:
        words: of 4 bytes, that a program of a kernel moves at a time: the more, the faster. A power of two.
        programs: of a kernel, each on a multiprocessor of its own.
    """

    words: int
    programs: int = _PROGRAMS

    @classmethod
    def fitted(cls, bytes_per_s: float, device: torch.device) -> tuple[Link, float]:
        """The link whose rate is nearest to `bytes_per_s` in one direction, and its rate, measured on `device`."""
        own = torch.empty(_FITTED_BYTES, dtype=torch.uint8, device=device)
        all_ranks = torch.empty(2 * _FITTED_BYTES, dtype=torch.uint8, device=device)
        rates = {words: cls(words)._rate(own, all_ranks) for words in _BLOCKS}
        words = min(rates, key=lambda words: abs(math.log(rates[words] / bytes_per_s)))
        wanted = round(_PROGRAMS * bytes_per_s / rates[words])
        link = cls(words, max(_PROGRAMS * 2 // 3, min(wanted, _PROGRAMS * 4 // 3)))
        return link, link._rate(own, all_ranks)

    def _rate(self, own: Tensor, all_ranks: Tensor) -> float:
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize(own.device)
            since = time.perf_counter()
            self.gather(own, all_ranks, 0)
            torch.cuda.synchronize(own.device)
            seconds.append(time.perf_counter() - since)
        return own.nbytes / min(seconds)

    def gather(self, own: Tensor, target: Tensor, rank: int) -> None:
        """(n,) and (ranks * n,): `own` as each rank's part of `target`."""
        if own.numel() == 0:
            return
        if target.numel() == own.numel() or any(x.nbytes % 4 or x.data_ptr() % 4 for x in (own, target)):
            for part in target.view(-1, own.numel()):
                if part.data_ptr() != own.data_ptr():
                    part.copy_(own)
            return
        source, parts = own.view(torch.int32), target.numel() // own.numel()
        _link_gather_kernel[(self.programs,)](
            source, target.view(torch.int32), source.numel(), parts, rank, BLOCK=self.words, num_warps=_NUM_WARPS
        )

    def reduce_scatter(self, source: Tensor, target: Tensor, rank: int, factor: float) -> None:
        """(ranks * n,) and (n,): `target` is the part of `rank` times `factor`."""
        if target.numel() == 0:
            return
        parts, count = source.numel() // target.numel(), target.numel()
        own, block = source[rank * count : (rank + 1) * count], self._block(target)
        if parts == 1 or _in_torch(source):
            target.copy_(own * factor)
            return
        _link_reduce_kernel[(self.programs,)](
            source, own, target, count, parts, rank, factor, BLOCK=block, num_warps=_NUM_WARPS
        )

    def scale(self, x: Tensor, factor: float) -> None:
        """(n,): `x` times `factor`, in place; with 1 it is read and written as it is."""
        if x.numel() == 0:
            return
        if _in_torch(x):
            x.mul_(factor)
            return
        _link_scale_kernel[(self.programs,)](x, x.numel(), factor, BLOCK=self._block(x), num_warps=_NUM_WARPS)

    def _block(self, x: Tensor) -> int:
        return max(1, 4 * self.words // x.element_size())


def _in_torch(x: Tensor) -> bool:
    """Counters and norms: too few to take time, and fp32 would round them."""
    return not x.dtype.is_floating_point or x.dtype is torch.float64
