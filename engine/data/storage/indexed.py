"""Token files in Megatron's format: PREFIX.bin holds the tokens, PREFIX.idx the sequences and documents.

Megatron-core reads these files and we read its; source: megatron/core/datasets/indexed_dataset.py of Megatron-LM, laid
out in `engine.data.storage.layout`. Ours have PREFIX.sums.json too (`engine.data.storage.sums`): damage is found.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from engine.data.storage.files import replace, temporary_name
from engine.data.storage.layout import Names, pack
from engine.data.storage.reader import IndexedFile
from engine.data.storage.sums import BLOCK, BlockHasher, Sums

__all__ = ["MAX_SEQUENCE", "IndexedFile", "IndexedWriter", "merge", "token_dtype"]

_STAGED_TOKENS = 1 << 18
MAX_SEQUENCE = (1 << 31) - 1
"""Most tokens of one sequence: the index holds lengths as int32."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Dtype of the files we write: uint16 for up to 65536 entries, else int32.

    Megatron's `DType.optimal_dtype` changes to int32 at 65500 entries already; both read both.
    """
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


class IndexedWriter:
    """Writes an indexed file and its sums. Use as a context manager.

    The three files appear under their names when all are complete and on disk: first .bin, then .idx, then the sums.
    When the block raises, or anything was refused in it, nothing is left. `digest` is empty until the end.

    Raises DataError 439 when the files cannot be written, above all for lack of space.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.digest = ""
        self.num_tokens = 0
        self._names = Names(prefix, "data.cache_dir")
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._staged = np.empty(_STAGED_TOKENS, np.int64)
        self._fill = 0
        self._lengths, self._bounds = array("i"), array("q", [0])
        self._hasher = BlockHasher()
        self._failed: Exception | None = None
        with self._disk():
            self._file = open(temporary_name(self._names.bin), "wb")  # noqa: SIM115 - closed by __exit__

    @property
    def num_documents(self) -> int:
        return len(self._bounds) - 1

    def add_document(self, parts: Sequence[ArrayLike]) -> None:
        """Append a document of one sequence of token ids for each part. No parts: an empty document.

        Raises ValueError for what is not one-dimensional integers, and, up to some thousand documents later, for an
        id outside 0 .. vocab_size - 1.
        """
        for part in parts:
            try:
                # NumPy takes three times as long for a list.
                ids = np.asarray(array("Q", part) if isinstance(part, list) else part)
            except (TypeError, OverflowError) as error:
                raise self._fail(ValueError(f"not a sequence of token ids: {error}")) from error
            if ids.ndim != 1 or ids.size > MAX_SEQUENCE or (ids.size and ids.dtype.kind not in "iu"):
                raise self._fail(ValueError(f"a sequence of token ids cannot be {ids.dtype} of shape {ids.shape}"))
            self._stage(ids)
            self._lengths.append(ids.size)
        self._bounds.append(len(self._lengths))

    def add_file(self, file: IndexedFile) -> None:
        """Append all documents of `file`."""
        if not file.contiguous:
            for first, stop in zip(file.documents[:-1].tolist(), file.documents[1:].tolist(), strict=True):
                self.add_document([file.sequence(i) for i in range(first, stop)])
            return
        self._stage(file.tokens)
        self._bounds.frombytes((file.documents[1:] + len(self._lengths)).astype("=i8").tobytes())
        self._lengths.frombytes(file.lengths.astype("=i4").tobytes())

    def _stage(self, ids: NDArray[Any]) -> None:
        self.num_tokens += ids.size
        while ids.size:
            now = ids[: _STAGED_TOKENS - self._fill]
            self._staged[self._fill : self._fill + now.size] = now
            self._fill += now.size
            ids = ids[now.size :]
            if self._fill == _STAGED_TOKENS:
                self._flush()

    def _flush(self) -> None:
        ids = self._staged[: self._fill]
        if ids.size == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < self._vocab_size:
            raise self._fail(ValueError(f"token ids {low} .. {high} outside 0 .. {self._vocab_size - 1}"))
        payload = ids.astype(self._dtype).data.cast("B")
        self._hasher.update(payload)
        with self._disk():
            self._file.write(payload)
        self._fill = 0

    def _fail(self, error: Exception) -> Exception:
        self._failed = error
        return error

    @contextmanager
    def _disk(self) -> Iterator[None]:
        folder = self._names.prefix.parent
        try:
            yield
        except OSError as error:
            free = "unknown"
            with suppress(OSError):
                free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"
            written = f"{self._hasher.size / 1e6:.1f} MB"
            rule = f"cannot be written ({error.strerror or error}) after {written}; free in {folder}: {free}"
            way_out = "Free space there, or set data.cache_dir to a folder with more"
            raise self._fail(self._names.refuse(439, self._names.prefix, rule, way_out)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finals = [self._names.bin, self._names.idx, self._names.sums]
        try:
            if kind is None and self._failed is not None:
                raise self._failed
            if kind is None:
                self._flush()
                with self._disk():
                    self._commit(finals)
        finally:
            with suppress(OSError):
                self._file.close()
            for path in finals:
                temporary_name(path).unlink(missing_ok=True)

    def _commit(self, finals: list[Path]) -> None:
        _, idx, sums = (temporary_name(path) for path in finals)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths, bounds = np.asarray(self._lengths), np.asarray(self._bounds)
        index = b"".join(pack(self._dtype, lengths, bounds))
        found = Sums(
            block=BLOCK,
            bin_size=self._hasher.size,
            bin_sums=self._hasher.sums(),
            idx_size=len(index),
            idx_sum=xxhash.xxh3_128_hexdigest(index),
        )
        for path, content in ((idx, index), (sums, found.text().encode())):
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        try:
            for path in finals:
                replace(temporary_name(path), path)
        except BaseException:
            for path in finals:
                path.unlink(missing_ok=True)
            raise
        self.digest = found.digest


def merge(parts: Sequence[Path], target: Path, vocab_size: int) -> None:
    """Write `target` from the documents of indexed files, in order: the same bytes as from one IndexedWriter.

    Each part is verified first. Raises DataError: 430 to 438 a part, 439 the target.
    """
    with IndexedWriter(target, vocab_size) as writer:
        for part in parts:
            file = IndexedFile.open(part, "data.cache_dir", empty=True)
            file.verify(foreign=True)
            writer.add_file(file)
