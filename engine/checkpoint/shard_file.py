"""Writing a rank's file: safetensors from rectangles that lie scattered in its memory, hashed on the way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.manifest import BLOCK, ITEM, ShardFile
from engine.dist.context import ParallelContext
from engine.optim.state import Slot
from engine.parallel.rectangles import Patch, Rectangle, matrix_shape, patches

_ALIGNMENT = 64
_THREADS, _COPIERS = 4, 8
_STRIP = 1 << 22
"""Elements that a thread copies at a time."""


@dataclass(frozen=True, slots=True)
class Source:
    """A rectangle to write, and the live memory that holds its elements."""

    kind: str
    name: str
    shape: tuple[int, ...]
    """Of the logical tensor."""
    rectangle: Rectangle
    values: Tensor
    """(rows, columns) of the rectangle."""


def placed(slot: Slot, ctx: ParallelContext) -> list[tuple[Rectangle, Tensor]]:
    """The rectangles of the logical tensor that `slot` holds, as views of its memory."""
    piece, values = slot.piece, slot.values
    found = patches(piece.logical, piece.local_shape, piece.start, piece.size, rank=ctx.tp.rank, ranks=ctx.tp.size)
    return [(patch.rectangle, _view(values, patch)) for patch in found]


def _view(values: Tensor, patch: Patch) -> Tensor:
    first = values.storage_offset() + patch.offset
    return values.as_strided(patch.rectangle.shape, (patch.stride, 1), first)


def sources(slots: Sequence[Slot], ctx: ParallelContext) -> list[Source]:
    """What this rank writes, so that every element is written once.

    What all ranks of `ctx.reduce` hold is shared out among them by size; what all tensor-parallel ranks hold, the first
    writes; a tied weight is its first stage's.
    """
    found, loads = [], [0] * ctx.reduce.size
    for slot in slots:
        if slot.piece.copy or (slot.piece.logical.dim is None and not ctx.tp.is_first):
            continue
        if slot.shared:
            least = loads.index(min(loads))
            loads[least] += slot.piece.size
            if least != ctx.reduce.rank:
                continue
        logical = slot.piece.logical
        found += [
            Source(slot.kind, logical.name, logical.shape, rectangle, values) for rectangle, values in placed(slot, ctx)
        ]
    return found


def header_of(parts: Sequence[Source]) -> bytes:
    """The safetensors header: https://huggingface.co/docs/safetensors, "Format"."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in parts:
        top, bottom, left, right = part.rectangle
        size = part.rectangle.size * ITEM
        whole = part.rectangle.shape == matrix_shape(part.shape)
        name = f"{part.kind}/{part.name}" + ("" if whole else f"[{top}:{bottom},{left}:{right}]")
        shape = part.shape if whole else part.rectangle.shape
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class Snapshot:
    """A copy of a rank's part in host memory, laid out as in its file. The memory serves one save after the other."""

    def __init__(self, parts: Sequence[Source], *, pinned: bool) -> None:
        self._size = sum(part.rectangle.size for part in parts)
        # Zeros, so that the pages are there: the first touch of a page costs more than the copy into it.
        self._buffer = torch.zeros(self._size, dtype=torch.float32)
        self._pinned = pinned and self._size > 0
        if self._pinned:
            # torch's own page-locked memory is rounded up to a power of two, and never given back.
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(*self._extent, 0))

    @property
    def _extent(self) -> tuple[int, int]:
        return self._buffer.data_ptr(), self._size * ITEM

    def free(self) -> None:
        """Give the memory back. Nothing may be copied afterwards."""
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._extent[0]))
        self._buffer, self._pinned, self._size = torch.empty(0), False, 0

    @torch.no_grad()
    def take(self, parts: Sequence[Source]) -> None:
        """Copy `parts`, which are as many elements as those that the memory was made for."""
        pairs: list[tuple[Tensor, Tensor]] = []
        offset = 0
        for part in parts:
            into = self._buffer.narrow(0, offset, part.rectangle.size).view(part.rectangle.shape)
            rows = max(1, _STRIP // max(1, part.rectangle.shape[1])) if not self._pinned else len(into)
            pairs += zip(into.split(rows), part.values.split(rows), strict=True)
            offset += part.rectangle.size
        if self._pinned:
            for into, values in pairs:
                into.copy_(values, non_blocking=True)
            torch.cuda.synchronize()
            return
        # The cores are idle: the step waits.
        with ThreadPoolExecutor(min(_COPIERS, len(os.sched_getaffinity(0)))) as pool:
            list(pool.map(lambda pair: pair[0].copy_(pair[1]), pairs))

    @property
    def bytes(self) -> memoryview:
        """The copy."""
        return self._buffer.numpy().data.cast("B")


def write_shard(path: Path, parts: Sequence[Source], content: memoryview) -> ShardFile:
    """Write header and `content` to the new file `path`, durably. Raises OSError."""
    header = header_of(parts)
    size = len(header) + len(content)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            write = _block_writer(descriptor, header, content)
            sums = tuple(pool.map(write, range(-(-size // BLOCK))))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    places = tuple((part.kind, part.name, part.rectangle) for part in parts)
    return ShardFile(path.name, size, len(header), sums, places)


def _block_writer(descriptor: int, header: bytes, content: memoryview) -> Callable[[int], str]:
    def write(number: int) -> str:
        first, last = number * BLOCK, (number + 1) * BLOCK
        views = [
            memoryview(header)[first:last],
            content[max(0, first - len(header)) : max(0, last - len(header))],
        ]
        digest = hashlib.sha256()
        for view in views:
            digest.update(view)
            while view:
                done = os.pwrite(descriptor, view, first)
                first, view = first + done, view[done:]
        return digest.hexdigest()

    return write
