"""Bytes of a unit's file: plain, gzip or Zstandard, whole or up to a limit."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

from engine.config.schema_data import DataConfig
from engine.data.corpus.listing import COMPRESSED_SUFFIXES
from engine.data.corpus.units import BadInputError, Unit, optional

_PLAIN_BYTES = 1 << 24
_PACKED_BYTES = 1 << 16
"""Small: 64 KiB of gzip can hold 64 MiB."""


def is_compressed(path: str) -> bool:
    """Whether the suffix of `path` says that it is compressed."""
    return path.lower().endswith(tuple(COMPRESSED_SUFFIXES))


def chunks(unit: Unit, cfg: DataConfig) -> Iterator[bytes]:
    """The content of the whole file, decompressed. With a limit, what its first `limit` bytes on disk hold.

    Raises OSError, BadInputError for a damaged or truncated stream, DataError 442.
    """
    left = unit.size if unit.limit is None else unit.limit
    packed = is_compressed(unit.path)
    engine, used = _engine(unit.path, cfg) if packed else None, False
    with open(unit.path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, _PACKED_BYTES if packed else _PLAIN_BYTES))):
            left -= len(chunk)
            if engine is None:
                yield chunk
                continue
            while chunk:
                if engine.eof:  # another member (gzip) or frame follows; zeros are gzip's padding
                    engine, used, chunk = _engine(unit.path, cfg), False, chunk.lstrip(b"\0")
                    continue
                used = True
                content = _decompress(engine, chunk)
                chunk = engine.unused_data if engine.eof else b""
                if content:
                    yield content
    if engine is not None and used and not engine.eof and unit.limit is None:
        raise BadInputError(f"is truncated: its {unit.size} bytes end in the middle of the compressed stream")


def _engine(path: str, cfg: DataConfig) -> Any:
    if path.lower().endswith(".gz"):
        return zlib.decompressobj(wbits=31)
    return optional("zstandard", cfg, path).ZstdDecompressor().decompressobj()


def _decompress(engine: Any, chunk: bytes) -> bytes:
    try:
        content: bytes = engine.decompress(chunk)
    except Exception as error:  # zlib.error or zstandard.ZstdError, which is there only with the package
        raise BadInputError(f"cannot be decompressed ({error})") from error
    return content
