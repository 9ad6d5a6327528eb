"""Token files: a flat array of token ids on disk, memory-mapped by every rank.

Layout of `<name>.tokens`, little-endian:

| bytes | field | |
|---|---|---|
| 0-7 | magic | `OCTOKENS` |
| 8-11 | version, uint32 | 1 |
| 12-15 | bytes per token, uint32 | 2 (uint16, vocabularies up to 65536) or 4 (uint32) |
| 16-23 | count, uint64 | tokens |
| 24-31 | vocabulary, uint64 | every id is below it |
| 32- | payload | count * bytes per token |

Beside it `<name>.tokens.json` holds the BLAKE2b-256 digest of the payload.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import DataError

MAGIC = b"OCTOKENS"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQ")
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype that holds ids below `vocab_size`: uint16 up to 65536, then uint32."""
    return _DTYPES[2 if vocab_size <= 1 << 16 else 4]


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _refuse(code: int, path: Path, rule: str) -> Exception:
    return DataError.of(
        code,
        "data.cache_dir",
        path.parent,
        f"{path} {rule}",
        f"Delete the folder {path.parent}; the next run builds it again",
    )


class TokenWriter:
    """Writes a token file and its sidecar. Use as a context manager.

    Nothing appears under the final name before everything is on disk: the data goes to a temporary name in the same
    folder, is synced and then renamed. When the block raises, the temporary file is removed.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.count = 0
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._digest = hashlib.blake2b(digest_size=32)
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(self._header())

    def _header(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self._dtype.itemsize, self.count, self._vocab_size)

    @property
    def digest(self) -> str:
        """Hex BLAKE2b-256 of the tokens appended so far."""
        return self._digest.hexdigest()

    def append(self, ids: ArrayLike) -> None:
        """Append one-dimensional token ids. Raises ValueError for an id outside 0 .. vocab_size - 1."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self._vocab_size:
            raise ValueError(f"token ids {array.min()} .. {array.max()} outside 0 .. {self._vocab_size - 1}")
        payload = array.astype(self._dtype).tobytes()
        self._digest.update(payload)
        self._file.write(payload)
        self.count += array.size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            return
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        write_json(_sidecar(self.path), {"count": self.count, "blake2b": self.digest})
        os.replace(self._temporary, self.path)


@dataclass(frozen=True, slots=True)
class TokenFile:
    """An opened token file. `tokens` is a read-only memory map of `count` ids, uint16 or uint32."""

    path: Path
    tokens: NDArray[Any]
    vocab_size: int

    @property
    def count(self) -> int:
        """Tokens in the file."""
        return int(self.tokens.shape[0])

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Map `path` after checking its header and size; the payload is not read.

        Raises DataError: 407 missing, 408 not a token file of this version, 409 size and count differ.
        """
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                header = file.read(_HEADER.size)
        except OSError as error:
            raise _refuse(407, path, f"cannot be read ({error.strerror})") from error
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise _refuse(408, path, f"is not a token file: it does not start with {MAGIC.decode()} and 24 more bytes")
        _, version, width, count, vocab_size = _HEADER.unpack(header)
        if version != VERSION or width not in _DTYPES or count == 0:
            raise _refuse(
                408,
                path,
                f"has version {version}, {width} bytes per token, {count} tokens; legal are version {VERSION}, "
                "2 or 4 bytes, 1 or more tokens",
            )
        expected = _HEADER.size + count * width
        if size != expected:
            raise _refuse(409, path, f"has {size} bytes, but {count} tokens of {width} bytes make {expected}")
        tokens = np.memmap(path, dtype=_DTYPES[width], mode="r", offset=_HEADER.size, shape=(count,))
        return cls(path, tokens, vocab_size)

    def verify(self) -> str:
        """Compare the payload with the sidecar's digest (reads the whole file, about 1 GB/s) and return the digest.

        Raises DataError 410 when they differ or the sidecar is missing or malformed.
        """
        digest = hashlib.blake2b(self.tokens.data, digest_size=32).hexdigest()
        try:
            recorded = read_json(_sidecar(self.path)).get("blake2b")
        except (OSError, ValueError) as error:
            raise _refuse(410, _sidecar(self.path), f"cannot be read ({error})") from error
        if digest != recorded:
            raise _refuse(410, self.path, f"is damaged: its digest is {digest[:12]}..., recorded is {recorded}")
        return digest


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to a temporary name, sync it and rename it to `path`."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError or ValueError."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
