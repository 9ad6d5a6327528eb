"""Checksums of an indexed file: XXH3-128 of each block of PREFIX.bin and of PREFIX.idx, kept in PREFIX.sums.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypeVar

import xxhash

BLOCK = 1 << 24
"""Bytes of PREFIX.bin under one checksum."""
_CHUNK = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sizes in bytes, and hex checksums."""

    block: int
    bin_size: int
    bin_sums: list[str]
    idx_size: int
    idx_sum: str

    @property
    def digest(self) -> str:
        """One hex checksum of all: two indexed files with equal bytes have the same."""
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self)).encode())

    def text(self) -> str:
        """The only text that holds these sums."""
        return json.dumps({**asdict(self), "digest": self.digest}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """The sums in `path`. Raises OSError, or ValueError when it is not, byte for byte, what `text` gave."""
        text = path.read_bytes().decode()
        try:
            content = json.loads(text)
            del content["digest"]
            sums = cls(**content)
            blocks = -(-sums.bin_size // BLOCK)
            whole = sums.text() == text and sums.block == BLOCK and len(sums.bin_sums) == blocks
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a sums file: {error!r}") from error
        if not whole:
            raise ValueError("its own checksum does not fit")
        return sums


class BlockHasher:
    """Checksums of the blocks of a stream of bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._done: list[str] = []
        self._open = xxhash.xxh3_128()

    def update(self, content: memoryview) -> None:
        """Take the next bytes."""
        while content:
            now, content = content[: BLOCK - self.size % BLOCK], content[BLOCK - self.size % BLOCK :]
            self._open.update(now)
            self.size += len(now)
            if self.size % BLOCK == 0:
                self._done.append(self._open.hexdigest())
                self._open = xxhash.xxh3_128()

    def sums(self) -> list[str]:
        """One checksum for each block so far; the last block may be short."""
        return [*self._done, self._open.hexdigest()] if self.size % BLOCK else list(self._done)


def each_block(path: Path, size: int, fold: Callable[[Iterator[memoryview]], T]) -> Generator[T]:
    """`fold(pieces of the block)` for each block of the first `size` bytes of `path`, in order, on all cores.

    Pieces are multiples of 8 bytes but for the last of the file, and are overwritten by the next. The file is read
    and not mapped: a disk error raises OSError then, instead of killing the process. Raises EOFError when it is short.
    """

    def work(start: int) -> T:
        return fold(_pieces(handle, start, min(start + BLOCK, size), path))

    handle = os.open(path, os.O_RDONLY)
    pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 32))
    try:
        yield from pool.map(work, range(0, size, BLOCK))
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(handle)


def _pieces(handle: int, start: int, stop: int, path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_CHUNK))
    while start < stop:
        piece = buffer[: min(_CHUNK, stop - start)]
        filled = 0
        while filled < len(piece):
            count = os.preadv(handle, [piece[filled:]], start + filled)
            if count == 0:
                raise EOFError(f"{path} ends at byte {start + filled}")
            filled += count
        yield piece
        start += filled
