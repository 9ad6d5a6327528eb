"""Checkpoints without ranks: from tensors to a folder as a run writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.commit import PARTIAL, commit
from engine.checkpoint.manifest import COMPLETE, MANIFEST, Manifest, ShardFile, seal
from engine.checkpoint.reader import Reader
from engine.checkpoint.shard_file import Snapshot, Source, placed, write_shard
from engine.config import Config
from engine.config.load import to_dict
from engine.dist.context import ParallelContext
from engine.optim.state import Slot
from engine.parallel.rectangles import Rectangle, matrix_shape

State = Mapping[str, Mapping[str, Tensor]]
"""Tensors by kind and name."""


def facts_of(cfg: Config | None = None, step: int = 7, **more: Any) -> dict[str, Any]:
    """What the manifest of a run of `cfg` has beside its tensors; without `cfg` no options."""
    numbers = {"optimizer_steps": float(step)}
    config = {} if cfg is None else {"config": to_dict(cfg)}
    return {"step": step, "samples": 8 * step, "numbers": numbers, **config, **more}


def bands(tensors: State, count: int) -> list[list[Source]]:
    """The tensors in `count` files' parts: each as bands of rows, as even as can be."""
    found: list[list[Source]] = [[] for _ in range(count)]
    for kind, named in tensors.items():
        for name, value in named.items():
            rows, columns = matrix_shape(value.shape)
            matrix = value.float().reshape(rows, columns)
            cuts = [rows * index // count for index in range(count + 1)]
            for parts, top, bottom in zip(found, cuts[:-1], cuts[1:], strict=True):
                if top < bottom:
                    rectangle = Rectangle(top, bottom, 0, columns)
                    parts.append(Source(kind, name, tuple(value.shape), rectangle, matrix[top:bottom]))
    return found


def write_parts(path: Path, parts: Sequence[Source]) -> ShardFile:
    """One file of tensors."""
    copy = Snapshot(parts, pinned=False)
    copy.take(parts)
    return write_shard(path, parts, copy.bytes)


def write_checkpoint(folder: Path, tensors: State, facts: Mapping[str, Any] | None = None, files: int = 2) -> Path:
    """Write `folder` as a run on `files` ranks leaves it.

    Args:
        tensors: any dtype; stored in fp32.
        facts: by default those of `facts_of`.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    partial.mkdir(parents=True)
    written = []
    for rank, parts in enumerate(bands(tensors, files)):
        if parts:
            file = write_parts(partial / f"rank-{rank:05d}.safetensors", parts)
            written.append((file, {(part.kind, part.name): part.shape for part in parts}))
    commit(folder, dict(facts_of() if facts is None else facts), written)
    return folder


def fill(slots: Sequence[Slot], reader: Reader, ctx: ParallelContext) -> None:
    """What loading does with the slots of a rank."""
    for slot in slots:
        slot.values.zero_()
        for rectangle, values in placed(slot, ctx):
            reader.read(slot.kind, slot.piece.logical.name, rectangle, values)


def rewrite_manifest(folder: Path, content: bytes) -> None:
    """Put another manifest there, with the marker that belongs to it: what a forger could do."""
    (folder / MANIFEST).write_bytes(content)
    (folder / COMPLETE).write_text(seal(content))


def manifest_of(tensors: State, files: int = 1) -> Manifest:
    """The manifest of tensors that are nowhere: files of the right sizes, checksums of nothing."""
    shapes = {kind: {name: tuple(value.shape) for name, value in named.items()} for kind, named in tensors.items()}
    found = []
    for rank, parts in enumerate(bands(tensors, files)):
        size = 64 + 4 * sum(part.rectangle.size for part in parts)
        places = tuple((part.kind, part.name, part.rectangle) for part in parts)
        found.append(ShardFile(f"rank-{rank:05d}.safetensors", size, 64, ("0" * 64,), places))
    return Manifest(facts_of(), shapes, tuple(found))


def draws(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """A normal draw of each shape."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def flip_byte(path: Path, place: int) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
