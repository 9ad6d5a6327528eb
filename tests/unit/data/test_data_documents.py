"""Attention inside documents, and windows that slide: what is predicted, and how often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data import open_data, prepare
from engine.model.batch import IGNORE, Batch
from tests.unit.data.data_options import GPT, config, make_corpus, read, tokens_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("documents")
    make_corpus(root / "corpus")
    prepare(config(root), lambda line: None)
    return root


def pieces(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each document of a micro-batch, and of each padding."""
    assert batch.documents is not None
    starts = batch.documents.starts.tolist()
    assert starts[0] == 0 and starts[-1] == batch.tokens_BS.numel() and starts == sorted(set(starts))
    assert batch.documents.starts.dtype == torch.int32
    assert batch.documents.longest == max(np.diff(starts))
    assert set(range(0, starts[-1], batch.length)) <= set(starts)
    tokens, labels = batch.tokens_BS.flatten().tolist(), batch.labels_BS.flatten().tolist()
    return [(tokens[a:b], labels[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize("source", ["corpus", "random"])
def test_documents_predict_only_themselves(root: Path, source: str) -> None:
    path = str(root / "corpus") if source == "corpus" else source
    split = open_data(config(root, source=path, seq_len=30, document_mask=True), GPT).train
    plain = open_data(config(root, source=path, seq_len=30), GPT).train
    found = pieces(read(split, 20))
    assert len(found) > 25
    for tokens, labels in found:
        # Only the last of a piece may lack a label, and only a document's end does.
        assert IGNORE not in labels[:-1] and tokens[1:] == labels[:-1]
        if source == "corpus":
            assert 0 not in tokens[:-1] and (labels[-1] == IGNORE) == (tokens[-1] == 0)
    if source == "corpus":
        masked, whole = read(split, 20), read(plain, 20)
        assert torch.equal(masked.tokens_BS, whole.tokens_BS)
        assert torch.equal(masked.labels_BS == IGNORE, whole.tokens_BS == 0)


def test_padding_is_a_document_of_its_own(root: Path) -> None:
    cfg = config(root, seq_len=40, document_mask=True, variable_length=True)
    batch = read(open_data(cfg, GPT).train, 6, multiple=16)
    lengths = (batch.labels_BS != IGNORE).sum(dim=1).tolist()
    expected = sorted({0, *(r * batch.length + p for r, n in enumerate(lengths) for p in (n, batch.length))})
    assert batch.documents is not None and batch.documents.starts.tolist() == expected


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("overlap", [0, 1, 5, 7])
def test_every_token_is_predicted_exactly_once_in_an_epoch(root: Path, overlap: int, variable: bool) -> None:
    """Each window shows `overlap` tokens before its own; all that full windows reach is predicted once."""
    data = open_data(config(root, overlap=overlap, variable_length=variable), GPT)
    stored = tokens_of(data.folder / "valid")
    assert data.valid is not None
    batch = read(data.valid, data.valid.num_samples)
    labels = [label for row in batch.labels_BS.tolist() for label in row if label != IGNORE]
    if not variable:
        reach = 8 + (len(stored) - 9) // (8 - overlap) * (8 - overlap)
        assert labels == stored[1 : reach + 1] and len(stored) - 1 - reach < 8 - overlap
        for before, row in zip(batch.tokens_BS.tolist(), batch.tokens_BS.tolist()[1:], strict=False):
            assert overlap == 0 or before[-overlap:] == row[:overlap]
        assert (batch.labels_BS[1:, :overlap] == IGNORE).all() and (batch.labels_BS[0] != IGNORE).all()
    else:
        starts = [0, *(i + 1 for i, token in enumerate(stored[:-1]) if token == 0)]
        assert labels == [token for i, token in enumerate(stored) if i not in starts]
