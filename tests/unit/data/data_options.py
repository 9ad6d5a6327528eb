"""Options and readers that the tests of engine.data share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from engine.config.enums import Family, SentenceHead
from engine.config.schema import ModelConfig
from engine.config.schema_data import DataConfig
from engine.data import Split
from engine.data.samples.stream import Stream
from engine.data.storage.indexed import IndexedFile, IndexedWriter
from engine.model.batch import Batch, Documents


def config(root: Path, **changes: object) -> DataConfig:
    """A corpus in `root`/corpus with a cache beside it."""
    options: dict[str, object] = {
        "source": str(root / "corpus"),
        "seq_len": 8,
        "vocab_size": 300,
        "valid_fraction": 0.3,
        "workers": 1,
    }
    return DataConfig(**{**options, "cache_dir": str(root / "cache"), **changes})  # type: ignore[arg-type]


def make_corpus(folder: Path, lines: int = 1) -> None:
    """A dozen texts of 2 to 4 times `lines` lines."""
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"document {i} has number {i * i}\n" * (2 + i % 3) * lines)


def _model(family: Family, token_types: int = 0, head: SentenceHead = SentenceHead.none) -> ModelConfig:
    return ModelConfig(
        name="tiny",
        family=family,
        num_layers=1,
        hidden_size=8,
        num_heads=1,
        vocab_size=300,
        max_positions=64,
        token_types=token_types,
        sentence_head=head,
    )


GPT = _model(Family.gpt)
ONE_SEGMENT = _model(Family.bert)
TWO_SEGMENTS = _model(Family.bert, 2)
NEXT_SENTENCE = _model(Family.bert, 2, SentenceHead.next_sentence)
SENTENCE_ORDER = _model(Family.bert, 2, SentenceHead.sentence_order)
BERTS = {"one": ONE_SEGMENT, "two": TWO_SEGMENTS, "next": NEXT_SENTENCE, "order": SENTENCE_ORDER}


def stream(folder: Path, documents: Sequence[Sequence[Sequence[int]]], numbers: list[int] | None = None) -> Stream:
    """Documents of sequences of ids below 300, or those with `numbers` of them, as a stream."""
    with IndexedWriter(folder / "stream", 300) as writer:
        for document in documents:
            writer.add_document([np.array(sequence, dtype=np.int64) for sequence in document])
    return Stream(IndexedFile.open(folder / "stream"), None if numbers is None else np.array(numbers))


def tokens_of(prefix: Path) -> list[int]:
    """All tokens of a token file."""
    found: list[int] = IndexedFile.open(prefix).tokens.tolist()
    return found


def read(split: Split, rows: int, batch: int = 0, multiple: int = 1) -> Batch:
    """Micro-batch number `batch` of `rows` rows."""
    (micro,) = split.micro_batches(batch * rows, dp_rank=0, dp=1, micro_batch=rows, accum_steps=1, multiple=multiple)
    return micro


def same(a: Batch, b: Batch) -> bool:
    """Whether all fields of two batches are equal."""
    for name in Batch.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, Documents) and isinstance(y, Documents):
            x, y = x.starts, y.starts
        if not (x is y is None or (x is not None and y is not None and torch.equal(x, y))):
            return False
    return True


def rows_of(batch: Batch) -> Iterator[tuple[int, tuple[object, ...]]]:
    """Sample number of each row, and all it holds. Padding counts where a causal model cannot tell it from text."""
    borders = set() if batch.documents is None else set(batch.documents.starts.tolist())
    for r, number in enumerate(batch.samples_B.tolist()):
        length = batch.length if batch.lengths_B is None else int(batch.lengths_B[r])
        types = None if batch.token_types_BS is None else tuple(batch.token_types_BS[r, :length].tolist())
        sentence = None if batch.sentence_B is None else int(batch.sentence_B[r])
        starts = tuple(p for p in range(length) if r * batch.length + p in borders)
        tokens, labels = batch.tokens_BS[r, :length].tolist(), batch.labels_BS[r, :length].tolist()
        yield number, (tuple(tokens), tuple(labels), types, sentence, starts)


def by_number(split: Split, batch: int, dp: int, micro: int, accum: int) -> dict[int, tuple[object, ...]]:
    """Everything global batch `batch` holds without its padding: sample number -> row."""
    rows: dict[int, tuple[object, ...]] = {}
    for rank in range(dp):
        first = batch * dp * micro * accum
        for m in split.micro_batches(first, dp_rank=rank, dp=dp, micro_batch=micro, accum_steps=accum):
            assert m.tokens_BS.shape[0] == micro
            for number, row in rows_of(m):
                assert number not in rows
                rows[number] = row
    return rows


def sequence_hash(split: Split, plan: Sequence[tuple[int, int, int, int]]) -> str:
    """Hash of all samples in order, read in parts: (steps, dp, micro-batch, accumulation), one after the other."""
    digest, first = hashlib.blake2b(digest_size=16), 0
    for steps, dp, micro, accum in plan:
        for _ in range(steps):
            rows: dict[int, bytes] = {}
            for rank in range(dp):
                for m in split.micro_batches(first, dp_rank=rank, dp=dp, micro_batch=micro, accum_steps=accum):
                    rows.update(_bytes_of(m))
            assert sorted(rows) == list(range(first, first + dp * micro * accum))
            for number in sorted(rows):
                digest.update(rows[number])
            first += dp * micro * accum
    return digest.hexdigest()


def _bytes_of(batch: Batch) -> Iterator[tuple[int, bytes]]:
    fields = [batch.tokens_BS, batch.labels_BS]
    fields += [field for field in (batch.token_types_BS, batch.sentence_B) if field is not None]
    if batch.documents is not None:
        starts = torch.zeros(batch.tokens_BS.numel() + 1, dtype=torch.int64)
        starts[batch.documents.starts.long()] = 1
        fields.append(starts[:-1].view(batch.tokens_BS.shape))
    arrays = [field.numpy() for field in fields]
    for r, number in enumerate(batch.samples_B.tolist()):
        yield number, b"".join(array[r].tobytes() for array in arrays)
