"""How a checkpoint becomes one: durably and at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.manifest import COMPLETE, MANIFEST, Manifest, ShardFile, seal

PARTIAL = ".partial"
"""Added to the name of a folder that ranks still write into."""


def commit(
    folder: Path, facts: dict[str, Any], written: Sequence[tuple[ShardFile, Mapping[tuple[str, str], tuple[int, ...]]]]
) -> None:
    """Turn FOLDER.partial, into which every rank has written its file, into the checkpoint `folder`.

    Args:
        written: each file, and the shape of each logical tensor in it by kind and name.

    Raises:
        OSError: it cannot be written, or the files lack elements.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for _, found in written:
        for (kind, name), shape in found.items():
            shapes.setdefault(kind, {})[name] = shape
    manifest = Manifest(facts, shapes, tuple(file for file, _ in written))
    gaps = manifest.gaps()
    if gaps:
        raise OSError(f"the ranks' parts do not make up {gaps[:3]}")
    content = manifest.encode()
    write_durably(partial / MANIFEST, content)
    write_durably(partial / f"{COMPLETE}.tmp", seal(content).encode())
    sync_folder(partial)
    old = folder.with_name(f"{folder.name}.old")
    replaced = placed = False
    try:
        if folder.exists():
            # Only where a run goes on from before it: a checkpoint of the same step that it could not use.
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
            replaced = True
        os.rename(partial, folder)
        placed = True
        sync_folder(folder.parent)
        os.rename(folder / f"{COMPLETE}.tmp", folder / COMPLETE)
        sync_folder(folder)
    except OSError:
        if placed:
            shutil.rmtree(folder, ignore_errors=True)
        if replaced:
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file that is on disk when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
