"""Reading indexed token files: maps, checks, documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from engine.data.storage.layout import Names, check, parse
from engine.data.storage.sums import BLOCK, Sums, each_block


@dataclass(frozen=True, slots=True, eq=False)
class IndexedFile:
    """An opened PREFIX.bin and PREFIX.idx: read-only maps, which all processes of a machine share.

    `lengths` int32 (num_sequences,), tokens. `pointers` int64 (num_sequences,), bytes before a sequence. `documents`
    int64 (num_documents + 1,), numbers of first sequences. `tokens` (num_tokens,), all of PREFIX.bin as `dtype`.
    `contiguous`: the sequences fill PREFIX.bin one after the other, as in every file that we or Megatron write.
    """

    prefix: Path
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    documents: NDArray[np.int64]
    tokens: NDArray[Any]
    contiguous: bool
    sums: Sums | None
    option: str

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def digest(self) -> str | None:
        """Hex checksum of all the bytes, recorded when they were written; None for files without sums."""
        return self.sums.digest if self.sums else None

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """Tokens before each document, then all: int64 (num_documents + 1,), computed anew. Only if `contiguous`."""
        return np.append(self.pointers // self.dtype.itemsize, self.num_tokens)[self.documents]

    def sequence(self, number: int) -> NDArray[Any]:
        """Tokens of a sequence, a view. Raises IndexError."""
        if not 0 <= number < self.num_sequences:
            raise IndexError(f"sequence {number} of {self.num_sequences}")
        start = int(self.pointers[number]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[number])]

    def document(self, number: int) -> NDArray[Any]:
        """Tokens of all sequences of a document, a view if `contiguous`. Raises IndexError."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents}")
        first, stop = int(self.documents[number]), int(self.documents[number + 1])
        if first == stop:
            return self.tokens[:0]
        if not self.contiguous:
            return np.concatenate([self.sequence(i) for i in range(first, stop)])
        width = self.dtype.itemsize
        return self.tokens[
            int(self.pointers[first]) // width : int(self.pointers[stop - 1]) // width + int(self.lengths[stop - 1])
        ]

    @classmethod
    def open(cls, prefix: Path, option: str = "data.source", *, empty: bool = False) -> Self:
        """Map the files after checking all of PREFIX.idx and the size of PREFIX.bin, whose tokens are not read.

        `option`: where the user named them; `data.cache_dir` for files that the next run can build again. `empty`:
        accept files of no documents, which a writer may have made for `merge`.

        Raises DataError: 430 unreadable, 431 no such format, 432 damaged index size, 433 damaged structure, 434 no
        documents, 435 size of PREFIX.bin, 436 malformed sums, 437 other than the sums say.
        """
        names = Names(prefix, option)
        raw, content = _mapped(names.idx, names), _mapped(names.bin, names)
        sums = _read_sums(names)
        if sums is not None:
            if (len(raw), xxhash.xxh3_128_hexdigest(raw.data)) != (sums.idx_size, sums.idx_sum):
                raise names.refuse(437, names.idx, f"is damaged: it is not the file that {names.sums} was made for")
            if len(content) != sums.bin_size:
                rule = f"has {len(content)} bytes, {names.sums} records {sums.bin_size}"
                raise names.refuse(437, names.bin, rule)
        index = parse(raw, names)
        contiguous = check(index, len(content), names)
        file = cls(
            prefix=prefix,
            dtype=index.dtype,
            lengths=index.lengths,
            pointers=index.pointers,
            documents=index.documents,
            tokens=content.view(index.dtype),
            contiguous=contiguous,
            sums=sums,
            option=option,
        )
        if not (file.num_documents or empty):
            raise names.refuse(434, names.idx, "holds no documents", "Give a corpus that has at least one")
        return file

    def verify(
        self,
        show: Callable[[int, int], None] | None = None,
        *,
        vocab_size: int | None = None,
        foreign: bool = False,
    ) -> None:
        """Read all of PREFIX.bin, on all cores, and compare it with the sums; `open` has checked the index.

        `show` gets bytes done and bytes in all. With `vocab_size` each id must be below it. `foreign` files, made by
        others, may lack sums: then their structure, which `open` checks, and their ids are all there is to check.

        Raises DataError: 430 unreadable, 436 no sums, 437 a damaged block, 438 an id outside the vocabulary.
        """
        names = Names(self.prefix, self.option)
        if self.sums is None and not foreign:
            raise names.refuse(436, names.sums, "is missing, so damage cannot be found")
        if self.sums is None and vocab_size is None:
            return
        size = self.tokens.nbytes
        expected = self.sums.bin_sums if self.sums else None

        def fold(pieces: Iterator[memoryview]) -> tuple[str, int, int]:
            hasher, low, high = xxhash.xxh3_128(), 0, 0
            for piece in pieces:
                if expected is not None:
                    hasher.update(piece)
                if vocab_size is not None:
                    ids = np.frombuffer(piece, self.dtype)
                    low, high = min(low, int(ids.min())), max(high, int(ids.max()))
            return hasher.hexdigest(), low, high

        try:
            with closing(each_block(names.bin, size, fold)) as blocks:
                for number, (found, low, high) in enumerate(blocks):
                    first, last = number * BLOCK, min((number + 1) * BLOCK, size)
                    if expected is not None and found != expected[number]:
                        rule = f"is damaged: bytes {first} to {last} have checksum {found}, not the one in {names.sums}"
                        raise names.refuse(437, names.bin, rule)
                    if vocab_size is not None and not 0 <= low <= high < vocab_size:
                        rule = f"has token id {low if low < 0 else high} in bytes {first} to {last}; legal are 0 to "
                        rule += f"{vocab_size - 1}, as the vocabulary has {vocab_size} entries"
                        raise names.refuse(438, names.bin, rule, "Set data.tokenizer to the one that made this file")
                    if show is not None:
                        show(last, size)
        except (OSError, EOFError) as error:
            raise names.refuse(430, names.bin, f"cannot be read ({error})") from error


def _mapped(path: Path, names: Names) -> NDArray[np.uint8]:
    try:
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise names.refuse(430, path, f"cannot be read ({error.strerror})") from error


def _read_sums(names: Names) -> Sums | None:
    try:
        return Sums.read(names.sums)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise names.refuse(436, names.sums, f"is damaged or cannot be read ({error})") from error
