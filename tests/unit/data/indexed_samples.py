"""Documents, and indexed files of them, that the tests of indexed files share."""

from __future__ import annotations

from pathlib import Path

from engine.data.storage.indexed import IndexedFile, IndexedWriter

DOCUMENTS = [[[5, 0, 299]], [[7], [1, 2, 3]], [], [[]], [[4, 4], [], [9]]]
SHAPES = {
    "single": [[[i, i + 1, 299][: 1 + i % 3]] for i in range(20)],
    "several": [[[i] * (1 + j) for j in range(1 + i % 4)] for i in range(20)],
    "empty": DOCUMENTS,
}
VOCABULARIES = {"uint16": 300, "int32": 100_000}


def write(prefix: Path, documents: list[list[list[int]]], vocab_size: int = 300) -> IndexedWriter:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return writer


def contents(file: IndexedFile) -> list[list[list[int]]]:
    bounds = file.documents.tolist()
    sequences = [file.sequence(i).tolist() for i in range(file.num_sequences)]
    return [sequences[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def three(prefix: Path) -> list[bytes]:
    return [prefix.with_name(prefix.name + end).read_bytes() for end in (".bin", ".idx", ".sums.json")]
