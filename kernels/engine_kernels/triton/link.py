"""What a message between devices does to one of them: it holds some multiprocessors for as long as the link takes.

So a rank that runs alone on a device shares it with its messages as it would with those of NCCL, whose kernels copy by
a fixed number of blocks of 512 threads. They could copy faster than the link does, and wait for it: so what else the
device does slows a message down only when it leaves less than the link takes.
"""

# Arguments of kernels have types that no annotation says.
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

_PROGRAMS = 24
"""Channels that NCCL has on GPUs with NVLink 4."""
_NUM_WARPS = 16
_BLOCK_BYTES = 2**15
"""That a program of a kernel moves at a time."""
_MEASURED_BYTES = 2**27


@triton.jit
def _begin(PACED: tl.constexpr):
    return globaltimer() if PACED else 0


@triton.jit
def _wait_for_link(begun, blocks, block_ns, PACED: tl.constexpr):
    """Until the link has taken so many blocks of a program."""
    if PACED:
        due = begun + (blocks * block_ns).to(tl.int64)
        now = begun
        while now < due:
            now = globaltimer()


@triton.jit
def _block_of(number, count, BLOCK: tl.constexpr):
    """Step of the ring and elements of a block, numbered step after step."""
    blocks = tl.cdiv(count, BLOCK)
    step = number // blocks
    return step, (number - step * blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _link_gather_kernel(source, target, words, parts, rank, block_ns, BLOCK: tl.constexpr, PACED: tl.constexpr):
    """A ring's parts one after the other; the own one is written beside the first that comes."""
    begun = _begin(PACED)
    for number in range(tl.program_id(0), tl.cdiv(words, BLOCK) * (parts - 1), tl.num_programs(0)):
        step, index = _block_of(number, words, BLOCK)
        inside = index < words
        value = tl.load(source + index, mask=inside)
        part = (rank + 1 + step) % parts
        tl.store(target + part.to(tl.int64) * words + index, value, mask=inside)
        if step == 0:
            own = (rank + step) % parts
            tl.store(target + own.to(tl.int64) * words + index, value, mask=inside)
        _wait_for_link(begun, number // tl.num_programs(0) + 1, block_ns, PACED)


@triton.jit
def _link_reduce_kernel(
    source, own, target, count, parts, rank, factor, block_ns, BLOCK: tl.constexpr, PACED: tl.constexpr
):
    """Reads the part of a ring's step and the own one, and writes; the sum is the own part times `factor`."""
    begun = _begin(PACED)
    for number in range(tl.program_id(0), tl.cdiv(count, BLOCK) * (parts - 1), tl.num_programs(0)):
        step, index = _block_of(number, count, BLOCK)
        inside = index < count
        part = (rank + 1 + step) % parts
        other = tl.load(source + part.to(tl.int64) * count + index, mask=inside)
        value = tl.load(own + index, mask=inside).to(tl.float32) * factor
        # What is not a number stays none, and the other part is read for it.
        value = tl.where(other == other, value, other.to(tl.float32))
        tl.store(target + index, value.to(target.dtype.element_ty), mask=inside)
        _wait_for_link(begun, number // tl.num_programs(0) + 1, block_ns, PACED)


@triton.jit
def _link_scale_kernel(x, count, factor, block_ns, BLOCK: tl.constexpr, PACED: tl.constexpr):
    begun = _begin(PACED)
    for number in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        _, index = _block_of(number, count, BLOCK)
        inside = index < count
        value = tl.load(x + index, mask=inside).to(tl.float32) * factor
        tl.store(x + index, value.to(x.dtype.element_ty), mask=inside)
        _wait_for_link(begun, number // tl.num_programs(0) + 1, block_ns, PACED)


@dataclass(frozen=True, slots=True)
class Link:
    """A link of a device. All tensors are dense; messages are launched on the current stream.

    Args:
        bytes_per_s: in one direction, as long as the device's memory keeps up, of messages of some MiB: each program
            takes the time of whole blocks. None: as fast as the memory.
        programs: of a kernel, each on a multiprocessor of its own.
    """

    bytes_per_s: float | None
    programs: int = _PROGRAMS

    def measured(self, device: torch.device) -> float:
        """Bytes per second in one direction that messages of 128 MiB have on `device`."""
        own = torch.empty(_MEASURED_BYTES, dtype=torch.uint8, device=device)
        all_ranks = torch.empty(2 * _MEASURED_BYTES, dtype=torch.uint8, device=device)
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize(device)
            since = time.perf_counter()
            self.gather(own, all_ranks, 0)
            torch.cuda.synchronize(device)
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
            source, target.view(torch.int32), source.numel(), parts, rank, **self._launch(source)
        )

    def reduce_scatter(self, source: Tensor, target: Tensor, rank: int, factor: float) -> None:
        """(ranks * n,) and (n,): `target` is the part of `rank` times `factor`."""
        if target.numel() == 0:
            return
        parts, count = source.numel() // target.numel(), target.numel()
        own = source[rank * count : (rank + 1) * count]
        if parts == 1 or _in_torch(source):
            target.copy_(own * factor)
            return
        _link_reduce_kernel[(self.programs,)](source, own, target, count, parts, rank, factor, **self._launch(target))

    def scale(self, x: Tensor, factor: float) -> None:
        """(n,): `x` times `factor`, in place; with 1 it is read and written as it is."""
        if x.numel() == 0:
            return
        if _in_torch(x):
            x.mul_(factor)
            return
        _link_scale_kernel[(self.programs,)](x, x.numel(), factor, **self._launch(x))

    def _launch(self, x: Tensor) -> dict[str, Any]:
        """How a kernel that moves elements of `x` is launched."""
        rate = self.bytes_per_s
        block_ns = 0.0 if rate is None else 1e9 * _BLOCK_BYTES * self.programs / rate
        block = _BLOCK_BYTES // x.element_size()
        return {"block_ns": block_ns, "BLOCK": block, "PACED": rate is not None, "num_warps": _NUM_WARPS}


def _in_torch(x: Tensor) -> bool:
    """Counters and norms: too few to take time, and fp32 would round them."""
    return not x.dtype.is_floating_point or x.dtype is torch.float64
