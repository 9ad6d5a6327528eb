r"""Layout of PREFIX.idx: packing, parsing and structural checks.

Little-endian, as megatron/core/datasets/indexed_dataset.py of Megatron-LM writes it:

| bytes | field | |
|---|---|---|
| 0-8 | magic | `MMIDIDX\0\0` |
| 9-16 | version, uint64 | 1 |
| 17 | dtype of the tokens, uint8 | 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16 |
| 18-25 | n, uint64 | sequences |
| 26-33 | d, uint64 | document boundaries: documents + 1 |
| 34- | lengths, int32 (n,) | tokens of each sequence |
| | pointers, int64 (n,) | bytes of PREFIX.bin before it |
| | documents, int64 (d,) | number of the first sequence of each document, then n |
| | modes, int8 (n,) | only in multimodal files |

The arrays start at odd addresses: mapped, they are unaligned, and repeated searches want a copy.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SLICE = 1 << 20


@dataclass(frozen=True, slots=True)
class Names:
    """The files of `prefix`; `option` is where the user named it."""

    prefix: Path
    option: str

    @property
    def bin(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.bin")

    @property
    def idx(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.idx")

    @property
    def sums(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.sums.json")

    def refuse(self, code: int, path: Path, rule: str, way_out: str | None = None) -> Exception:
        """The error about `path`, with the way out for files of the cache or for the user's own."""
        cached = self.option == "data.cache_dir"
        value = self.prefix.parent if cached else self.prefix
        again = f"Make {self.prefix} again, or copy its .bin and .idx (and .sums.json, if it has one) here again"
        if cached:
            again = f"Delete the folder {value}; the next run builds it again"
        return DataError.of(code, self.option, value, f"{path} {rule}", way_out or again)


@dataclass(frozen=True, slots=True)
class Index:
    """Views into PREFIX.idx."""

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]


def pack(dtype: np.dtype[Any], lengths: NDArray[np.int32], documents: NDArray[np.int64]) -> Iterator[bytes]:
    """The pieces of an .idx whose sequences follow each other in PREFIX.bin."""
    code = next(code for code, name in _CODES.items() if np.dtype(name) == dtype)
    yield _HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents))
    yield lengths.astype("<i4").tobytes()
    pointers = np.cumsum(lengths, dtype=np.int64)
    pointers -= lengths
    yield (pointers * dtype.itemsize).astype("<i8").tobytes()
    yield documents.astype("<i8").tobytes()


def parse(raw: NDArray[np.uint8], names: Names) -> Index:
    """Views of the fields of `raw`, the whole .idx.

    Raises DataError: 431 not an index of tokens of this version, 432 size and counts differ, 434 no documents.
    """
    head = raw[: _HEADER.size].tobytes()
    if len(head) < _HEADER.size or not head.startswith(MAGIC):
        raise names.refuse(431, names.idx, f"is not an index of Megatron: it does not start with {MAGIC!r} + 25 bytes")
    _, version, code, count, bounds = _HEADER.unpack(head)
    if version != VERSION or code not in _CODES:
        rule = f"has version {version} and dtype code {code}; legal are version 1 and the integers {sorted(_CODES)}"
        raise names.refuse(431, names.idx, rule)
    size = _HEADER.size + 12 * count + 8 * bounds
    if len(raw) not in (size, size + count):
        rule = (
            f"has {len(raw)} bytes, but {count} sequences and {bounds} document boundaries "
            f"make {size} ({size + count} with modes)"
        )
        raise names.refuse(432, names.idx, rule)
    if bounds < 1:
        raise names.refuse(433, names.idx, "has no document boundary; the first must be 0")
    if raw[size:].any():
        raise names.refuse(433, names.idx, "has sequences whose mode is not 0: images or sound, not text")

    borders = [_HEADER.size, _HEADER.size + 4 * count, _HEADER.size + 12 * count, size]
    lengths, pointers, documents = (raw[a:b] for a, b in pairwise(borders))
    return Index(np.dtype(_CODES[code]), lengths.view("<i4"), pointers.view("<i8"), documents.view("<i8"))


def check(index: Index, bin_size: int, names: Names) -> bool:
    """Check the structure against a PREFIX.bin of `bin_size` bytes; whether its sequences follow each other.

    Raises DataError: 433 what the index says cannot be, 435 the size of PREFIX.bin does not fit it.
    """
    width, count = index.dtype.itemsize, len(index.lengths)
    if bin_size % width:
        rule = f"has {bin_size} bytes, no multiple of the {width} that a token has by {names.idx.name}"
        raise names.refuse(435, names.bin, rule)
    first, last = int(index.documents[0]), int(index.documents[-1])
    if first != 0 or last != count:
        rule = f"says that its documents are sequences {first} to {last}; it has {count}, so legal is 0 to {count}"
        raise names.refuse(433, names.idx, rule)
    for start in range(0, len(index.documents), _SLICE):
        part = index.documents[start : start + _SLICE + 1]
        _none(part[1:] < part[:-1], start, "document {} ends before it starts", names)
    end, before, follow = 0, 0, True
    for start in range(0, count, _SLICE):
        lengths = index.lengths[start : start + _SLICE].astype(np.int64) * width
        pointers = index.pointers[start : start + _SLICE].astype(np.int64)
        _none(lengths < 0, start, "sequence {} has a negative length", names)
        _none((pointers < 0) | (pointers % width != 0), start, "sequence {} starts at no token's address", names)
        _none(pointers > bin_size - lengths, start, f"sequence {{}} ends past the {bin_size} bytes of .bin", names)
        _none(np.diff(pointers, prepend=before) < 0, start, "sequence {} lies before the one ahead of it", names)
        stops = pointers + lengths
        follow = follow and int(pointers[0]) == end and bool((pointers[1:] == stops[:-1]).all())
        end, before = int(stops[-1]), int(pointers[-1])
    if follow and end != bin_size:
        rule = f"has {bin_size} bytes, but the sequences of {names.idx.name} end at byte {end}"
        raise names.refuse(435, names.bin, rule)
    return follow


def _none(broken: NDArray[np.bool_], offset: int, rule: str, names: Names) -> None:
    if broken.any():
        raise names.refuse(433, names.idx, f"is damaged: {rule.format(offset + int(broken.argmax()))}")
