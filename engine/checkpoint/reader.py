"""Reading a checkpoint: any rectangle of any logical tensor, whatever layout wrote it; and checking all of it."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.manifest import (
    BLOCK,
    COMPLETE,
    ITEM,
    MANIFEST,
    Manifest,
    ShardFile,
    blocks,
    decode,
    is_complete,
    seal,
)
from engine.errors import CheckpointError
from engine.parallel.rectangles import Rectangle, matrix_shape

_THREADS = 4


class Reader:
    """An open checkpoint. Its files are mapped, and read where they are looked at."""

    def __init__(self, folder: Path, option: str = "checkpoint.load") -> None:
        """Open what `folder` holds; of the tensors nothing is read yet.

        Raises:
            CheckpointError: 631 no finished checkpoint, 632 it is damaged (manifest, or a file missing or of another
                size), 633 a newer version, 634 none of ours.
        """
        self.folder, self._option = folder, option
        if not is_complete(folder):
            rule = f"it holds no finished checkpoint ({COMPLETE} is not there)"
            way_out = "Name the folder of a checkpoint, such as runs/mine/checkpoints/step-00001000, or of a run"
            raise CheckpointError.of(631, option, folder, rule, way_out)
        try:
            content, sealed = (folder / MANIFEST).read_bytes(), (folder / COMPLETE).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise self._damaged(f"{MANIFEST} cannot be read ({error})") from error
        if seal(content) != sealed:
            raise self._damaged(f"{MANIFEST} is not what {COMPLETE} records")
        self.seal = sealed
        """SHA-256 of the manifest: equal for equal checkpoints."""
        self.manifest: Manifest = decode(content, folder, option)
        for file in self.manifest.files:
            path = folder / file.name
            if not path.is_file():
                raise self._damaged(f"{file.name} is missing")
            if path.stat().st_size != file.size:
                raise self._damaged(f"{file.name} has {path.stat().st_size} bytes, {MANIFEST} records {file.size}")
        self._maps: dict[str, Tensor] = {}

    def _damaged(self, rule: str) -> CheckpointError:
        return damaged(self.folder, [rule], self._option)

    def read(self, kind: str, name: str, rectangle: Rectangle, out: Tensor) -> None:
        """Copy `rectangle` of a logical tensor into `out`, (rows, columns), any device, stride and dtype."""
        for file, part in self.manifest.parts[kind, name]:
            common = part.rectangle.intersection(rectangle)
            if common is None:
                continue
            stored = self._bytes(file)[part.offset : part.offset + part.rectangle.size * ITEM]
            whole = stored.view(torch.float32).view(part.rectangle.shape)
            out[_within(common, rectangle)].copy_(whole[_within(common, part.rectangle)])

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole logical tensor, fp32, on the CPU."""
        shape = self.manifest.shapes[kind][name]
        rows, columns = matrix_shape(shape)
        out = torch.empty(rows, columns)
        self.read(kind, name, Rectangle(0, rows, 0, columns), out)
        return out.view(shape)

    def _bytes(self, file: ShardFile) -> Tensor:
        if file.name not in self._maps:
            with open(self.folder / file.name, "rb") as opened:
                # Copy-on-write, as torch knows no memory that must not be written.
                mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self._maps[file.name] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._maps[file.name]

    def damages(self, rank: int = 0, ranks: int = 1) -> list[str]:
        """What is wrong with the part of the bytes that rank `rank` of `ranks` looks at: all of them for one rank."""
        return bad_blocks(self.folder, blocks(self.manifest.files)[rank::ranks])

    def verify(self) -> None:
        """Compare every byte with its checksum. Raises CheckpointError 632: some are others."""
        found = self.damages()
        if found:
            raise damaged(self.folder, found, self._option)


def damaged(folder: Path, found: Sequence[str], option: str) -> CheckpointError:
    """CheckpointError 632 about what was found in `folder`."""
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    rule = f"it is damaged: {'; '.join(found[:3])}{more}"
    way_out = "Name an earlier checkpoint, or copy this one again"
    return CheckpointError.of(632, option, folder, rule, way_out)


def bad_blocks(folder: Path, wanted: Iterable[tuple[ShardFile, int]]) -> list[str]:
    """Those of the blocks whose bytes are not what the manifest records, or cannot be read."""

    def look(item: tuple[ShardFile, int]) -> str | None:
        file, number = item
        try:
            descriptor = os.open(folder / file.name, os.O_RDONLY)
            try:
                content = os.pread(descriptor, BLOCK, number * BLOCK)
            finally:
                os.close(descriptor)
        except OSError as error:
            return f"{file.name} cannot be read ({error.strerror})"
        if hashlib.sha256(content).hexdigest() == file.sha256[number]:
            return None
        first = number * BLOCK
        return f"{file.name} has other bytes between {first:,} and {min(first + BLOCK, file.size):,}"

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return [found for found in pool.map(look, wanted) if found is not None]


def _within(inner: Rectangle, outer: Rectangle) -> tuple[slice, slice]:
    """Where `inner` stands in a matrix that holds `outer`."""
    rows = slice(inner.top - outer.top, inner.bottom - outer.top)
    return rows, slice(inner.left - outer.left, inner.right - outer.left)
