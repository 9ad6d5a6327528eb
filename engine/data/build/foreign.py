"""Entries of Megatron prefixes: the tokens stay where they are, the entry says which document is of which split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.enums import SampleKind
from engine.config.schema_data import DataConfig
from engine.data.build.cache import file_digest
from engine.data.build.census import Census
from engine.data.storage.indexed import IndexedFile
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import DataError


def foreign_entry(
    cfg: DataConfig, source: str, vocabulary: Vocabulary, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write the numbers of the documents of each split to `folder`, int64, ascending; what its meta file says of them.

    Reads all of PREFIX.bin once, to check its ids against the tokenizer and to split its documents by their content: a
    document's place between 0 and 1 is the BLAKE2b hash of its tokens' bytes, so copies never part; below
    data.valid_fraction it is of validation, then of the test, else of training. With data.max_bytes only the first
    documents that fit in so many bytes of PREFIX.bin are used.

    Raises DataError: 415 and 416 an empty split, 430 to 437 the files are damaged, 438 an id is none of the
    tokenizer's, 455 the files have no such data.kind.
    """
    file = IndexedFile.open(Path(source))
    _check_kind(cfg, source, file)
    file.verify(vocab_size=vocabulary.size, foreign=True)
    sequences, tokens = np.diff(file.documents), _document_tokens(file)
    count = file.num_documents
    if cfg.max_bytes is not None:
        count = int(np.searchsorted(np.cumsum(tokens) * file.dtype.itemsize, cfg.max_bytes, side="right"))
    if cfg.kind is SampleKind.text and not _any_ends(file, vocabulary.end, count):
        say(
            f"data: no document of {source}.bin ends with the token {vocabulary.end}, which ends documents in "
            f"{cfg.tokenizer}: another tokenizer may have made it, or it was made without --append-eod"
        )
    places = np.array([_place(file, number) for number in range(count)], dtype=np.float64)
    borders = np.array([0.0, cfg.valid_fraction, cfg.valid_fraction + cfg.test_fraction, np.inf])
    census, splits = Census(), dict[str, Any]()
    for name, low, high in (("train", *borders[2:]), ("valid", *borders[:2]), ("test", *borders[1:3])):
        numbers = np.flatnonzero((places >= low) & (places < high)).astype(np.int64)
        if not len(numbers):
            continue
        chosen = places[numbers]
        census.count(name, float(chosen.min()), float(chosen.max()), len(numbers))
        path = folder / f"{name}.documents.npy"
        np.save(path, numbers)
        splits[name] = {
            "documents": len(numbers),
            "sequences": int(sequences[numbers].sum()),
            "tokens": int(tokens[numbers].sum()),
            "digest": hashlib.blake2b(chosen.tobytes(), digest_size=16).hexdigest(),
            "files": {path.name: file_digest(path)},
        }
    census.check(cfg, source)
    prefix = str(Path(source).absolute())
    return {"prefix": prefix, "splits": splits, "bytes": file.tokens.nbytes, "label_type": None, "problems": []}


def _document_tokens(file: IndexedFile) -> NDArray[np.int64]:
    """Tokens of each document, some of which may have no sequence."""
    before = np.concatenate([[0], np.cumsum(file.lengths, dtype=np.int64)])
    return np.diff(before[file.documents])


def _check_kind(cfg: DataConfig, source: str, file: IndexedFile) -> None:
    rule = ""
    if cfg.kind is SampleKind.rows:
        rule = f"{source} is a Megatron prefix, which has no labels"
    elif cfg.kind is SampleKind.completion:
        odd = np.flatnonzero(np.diff(file.documents) != 2)
        if len(odd):
            found = int(np.diff(file.documents)[odd[0]])
            rule = f"document {odd[0]} of {source} has {found} sequences; a prompt and its completion are 2"
    if rule:
        raise DataError.of(455, "data.kind", cfg.kind, rule, "Nearest legal: data.kind=text")


def _place(file: IndexedFile, number: int) -> float:
    digest = hashlib.blake2b(digest_size=8)
    for sequence in range(int(file.documents[number]), int(file.documents[number + 1])):
        digest.update(file.sequence(sequence).tobytes())
    return int.from_bytes(digest.digest(), "big") / 2.0**64


def _any_ends(file: IndexedFile, end: int, count: int) -> bool:
    for number in range(count):
        ids = file.document(number)
        if len(ids) and int(ids[-1]) == end:
            return True
    return count == 0
