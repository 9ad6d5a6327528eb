"""The folder of a checkpoint: what is in it, and how it is told from one that is not finished.

| in the folder | |
|---|---|
| `rank-00000.safetensors`, ... | each rank's part: rectangles of logical tensors, fp32 |
| `manifest.json` | `Manifest`: which rectangle is where, SHA-256 of every block of the files, facts of the run |
| `COMPLETE` | SHA-256 of `manifest.json`; written last, under its name only by a rename |

A logical tensor is seen as a matrix, see `engine.parallel.rectangles`. Nothing in it is pickled. torch's distributed
checkpoints (`torch.distributed.checkpoint`) are not used: their metadata is a pickle and has no checksums.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.parallel.rectangles import Rectangle, matrix_shape

FORMAT, VERSION = "octant-checkpoint", 1
MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
BLOCK = 1 << 24
"""Bytes of a file under one SHA-256."""
ITEM = 4
"""Bytes of an element."""


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of logical tensor `name`'s `kind` of state, row after row; `offset` bytes into the file."""

    kind: str
    name: str
    rectangle: Rectangle
    offset: int


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One rank's file."""

    name: str
    size: int
    """Bytes."""
    header: int
    """Bytes before the first element."""
    sha256: tuple[str, ...]
    """Of every `BLOCK` bytes, the last one perhaps shorter; hex."""
    rectangles: tuple[tuple[str, str, Rectangle], ...]
    """Kind, name and place of what follows the header, one after the other."""

    def parts(self) -> Iterator[Part]:
        """Where each rectangle stands."""
        offset = self.header
        for kind, name, rectangle in self.rectangles:
            yield Part(kind, name, rectangle, offset)
            offset += rectangle.size * ITEM

    def to_json(self) -> dict[str, Any]:
        """As `manifest.json` has it."""
        rows = [[kind, name, *rectangle] for kind, name, rectangle in self.rectangles]
        found = {"name": self.name, "size": self.size, "header": self.header, "sha256": list(self.sha256)}
        return {**found, "rectangles": rows}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ShardFile:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError: it is none."""
        rows = tuple((str(kind), str(name), Rectangle(*map(int, place))) for kind, name, *place in raw["rectangles"])
        name, size, header = str(raw["name"]), int(raw["size"]), int(raw["header"])
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise ValueError(f"{name!r} is no file of tensors in the folder")
        if header < 0 or header % ITEM:
            raise ValueError(f"{name} cannot have elements after {header} bytes")
        if size != header + ITEM * sum(place.size for _, _, place in rows):
            raise ValueError(f"{name} is {size} bytes, its rectangles others")
        if len(raw["sha256"]) != -(-size // BLOCK):
            raise ValueError(f"{name} has {len(raw['sha256'])} checksums for {size} bytes")
        return cls(name, size, header, tuple(map(str, raw["sha256"])), rows)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    facts: dict[str, Any]
    """Of the run: step, samples, config, grid, versions, data, metrics, numbers of the engine."""
    shapes: dict[str, dict[str, tuple[int, ...]]]
    """Shape of each logical tensor, by kind and name."""
    files: tuple[ShardFile, ...]

    @cached_property
    def parts(self) -> dict[tuple[str, str], list[tuple[ShardFile, Part]]]:
        """Where the rectangles of each (kind, name) are."""
        found: defaultdict[tuple[str, str], list[tuple[ShardFile, Part]]] = defaultdict(list)
        for file in self.files:
            for part in file.parts():
                found[part.kind, part.name].append((file, part))
        return dict(found)

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.facts["step"])

    @property
    def size(self) -> int:
        """Bytes of all files of tensors."""
        return sum(file.size for file in self.files)

    def gaps(self) -> list[str]:
        """Logical tensors of which elements are missing, stored twice, or none of theirs."""
        found = []
        for kind, shapes in self.shapes.items():
            for name, shape in shapes.items():
                places = [part.rectangle for _, part in self.parts.get((kind, name), ())]
                rows, columns = matrix_shape(shape)
                inside = all(p.intersection(Rectangle(0, rows, 0, columns)) == p for p in places)
                if not inside or _overlap(places) or sum(place.size for place in places) != prod(shape):
                    found.append(f"{kind} {name}")
        return found + [f"{kind} {name}" for kind, name in self.parts if name not in self.shapes.get(kind, {})]

    def encode(self) -> bytes:
        """The content of `manifest.json`."""
        shapes = {kind: {name: list(shape) for name, shape in named.items()} for kind, named in self.shapes.items()}
        files = [file.to_json() for file in self.files]
        whole = {"format": FORMAT, "version": VERSION, **self.facts, "tensors": shapes, "files": files}
        return json.dumps(whole, indent=None, separators=(",", ":")).encode()


def _overlap(places: Iterable[Rectangle]) -> bool:
    """Whether two of the rectangles share an element."""
    above: list[Rectangle] = []
    for place in sorted(places):
        above = [other for other in above if other.bottom > place.top]
        if any(place.intersection(other) for other in above):
            return True
        above.append(place)
    return False


def decode(content: bytes, folder: Path, option: str) -> Manifest:
    """The manifest in `content`. Raises CheckpointError 633: of a newer version, 634: it is none of ours."""
    try:
        raw = json.loads(content)
        if raw["format"] != FORMAT:
            raise ValueError(f"its format is {raw['format']!r}")
        if raw["version"] > VERSION:
            rule = f"{MANIFEST} is of version {raw['version']}, and this Octant reads up to {VERSION}"
            raise CheckpointError.of(633, option, folder, rule, "Read it with the Octant that wrote it, or a newer one")
        shapes = {
            str(kind): {str(name): tuple(map(int, shape)) for name, shape in named.items()}
            for kind, named in raw.pop("tensors").items()
        }
        files = tuple(ShardFile.from_json(file) for file in raw.pop("files"))
        manifest = Manifest({name: raw[name] for name in raw if name not in ("format", "version")}, shapes, files)
        int(raw["step"]), int(raw["samples"]), dict(raw["numbers"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"{MANIFEST} cannot be read as a checkpoint's ({error!r})"
        raise CheckpointError.of(634, option, folder, rule, "Name a checkpoint that Octant wrote") from error
    gaps = manifest.gaps()
    if gaps:
        rule = f"elements of {len(gaps)} tensors are missing, there twice or out of place: {', '.join(gaps[:3])}"
        raise CheckpointError.of(634, option, folder, rule, "Name another checkpoint")
    return manifest


def seal(content: bytes) -> str:
    """What `COMPLETE` says of a manifest's content."""
    return hashlib.sha256(content).hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was finished there, whatever happened to it later."""
    return (folder / COMPLETE).is_file()


def blocks(files: Sequence[ShardFile]) -> list[tuple[ShardFile, int]]:
    """Every block of every file: the file, and the number of the block in it."""
    return [(file, block) for file in files for block in range(len(file.sha256))]
