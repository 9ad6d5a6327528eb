"""Options and readers that the tests of engine.data share."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config.enums import Family, SentenceHead
from engine.config.schema import DataConfig, ModelConfig
from engine.data import Split
from engine.model.batch import Batch


def config(root: Path, **changes: object) -> DataConfig:
    """A corpus in `root`/corpus with a cache beside it."""
    options: dict[str, object] = {
        "source": str(root / "corpus"),
        "seq_len": 8,
        "vocab_size": 300,
        "valid_fraction": 0.3,
    }
    return DataConfig(**{**options, "cache_dir": str(root / "cache"), **changes})  # type: ignore[arg-type]


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


def read(split: Split, rows: int, batch: int = 0, multiple: int = 1) -> Batch:
    """One micro-batch of `rows` rows."""
    (micro,) = split.micro_batches(batch, dp_rank=0, dp=1, micro_batch=rows, accum_steps=1, multiple=multiple)
    return micro


def same(a: Batch, b: Batch) -> bool:
    """Whether all fields of two batches are equal."""
    for name in Batch.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if not (x is y is None or (x is not None and y is not None and torch.equal(x, y))):
            return False
    return True


def by_number(split: Split, batch: int, dp: int, micro: int, accum: int) -> dict[int, tuple[object, ...]]:
    """Everything a global batch holds without its padding: sample number -> row."""
    rows: dict[int, tuple[object, ...]] = {}
    for rank in range(dp):
        for m in split.micro_batches(batch, dp_rank=rank, dp=dp, micro_batch=micro, accum_steps=accum):
            assert m.tokens_BS.shape[0] == micro
            for r, number in enumerate(m.samples_B.tolist()):
                length = m.length if m.lengths_B is None else int(m.lengths_B[r])
                types = None if m.token_types_BS is None else tuple(m.token_types_BS[r, :length].tolist())
                sentence = None if m.sentence_B is None else int(m.sentence_B[r])
                assert number not in rows
                tokens, labels = m.tokens_BS[r, :length].tolist(), m.labels_BS[r, :length].tolist()
                rows[number] = (tuple(tokens), tuple(labels), types, sentence)
    return rows
