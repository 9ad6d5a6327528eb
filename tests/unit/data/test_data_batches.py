"""Micro-batches of a language model, from a prepared corpus and from the random source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from engine.data import Data, open_data, prepare
from engine.model.batch import IGNORE
from tests.unit.data.data_options import (
    BERTS,
    GPT,
    NEXT_SENTENCE,
    by_number,
    config,
    make_corpus,
    read,
    same,
    tokens_of,
)

LAYOUTS = [(1, 1, 12), (2, 3, 2), (4, 3, 1), (3, 2, 2), (12, 1, 1)]
KINDS = {"gpt": GPT} | BERTS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_corpus(root / "corpus")
    prepare(config(root), lambda line: None)
    return root


@pytest.fixture(scope="module")
def data(root: Path) -> Data:
    return open_data(config(root), GPT)


def test_labels_are_the_tokens_one_later(data: Data) -> None:
    for split in (data.train, data.valid):
        assert split is not None
        micro = read(split, 3)
        assert micro.tokens_BS.shape == micro.labels_BS.shape == (3, 8)
        assert micro.tokens_BS.dtype == micro.labels_BS.dtype == micro.samples_B.dtype == torch.int64
        assert micro.tokens_BS.is_contiguous() and micro.labels_BS.is_contiguous()
        assert torch.equal(micro.tokens_BS[:, 1:], micro.labels_BS[:, :-1])
        assert micro.lengths_B is micro.token_types_BS is micro.sentence_B is micro.documents is None


@pytest.mark.parametrize(("dp", "micro", "accum"), LAYOUTS)
@pytest.mark.parametrize("source", ["corpus", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_same_rows_in_every_layout(
    root: Path, kind: str, source: str, dp: int, micro: int, accum: int
) -> None:
    path = str(root / "corpus") if source == "corpus" else source
    for variable in (False, True):
        split = open_data(config(root, source=path, variable_length=variable), KINDS[kind]).train
        for batch in (0, 3):
            whole = by_number(split, batch, 1, 12, 1)
            assert sorted(whole) == list(range(batch * 12, batch * 12 + 12))
            found = by_number(split, batch, dp, micro, accum)
            if variable and kind == "gpt":
                whole, found = (_unpadded(rows) for rows in (whole, found))
            assert found == whole


def _unpadded(rows: dict[int, tuple[object, ...]]) -> dict[int, list[tuple[int, int]]]:
    """A causal row's padding is not told by a length, but has no labels."""
    return {
        number: [pair for pair in zip(tokens, labels, strict=True) if pair[1] != IGNORE]  # type: ignore[call-overload]
        for number, (tokens, labels, *_) in rows.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_a_pure_function_of_seed_and_number(root: Path, kind: str) -> None:
    first, again = (open_data(config(root), KINDS[kind]).train for _ in range(2))
    later = read(first, 4, batch=7)
    read(first, 4, batch=2)
    assert same(later, read(again, 4, batch=7))
    assert not same(later, read(open_data(config(root, seed=1), KINDS[kind]).train, 4, batch=7))


def test_training_reads_every_sample_once_per_epoch_in_another_order(data: Data, root: Path) -> None:
    tokens = tokens_of(data.folder / "train")
    n = data.train.num_samples
    assert n == (len(tokens) - 1) // 8
    expected = sorted(tokens[i * 8 : i * 8 + 8] for i in range(n))
    first, second = (read(data.train, n, batch=epoch).tokens_BS.tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert read(open_data(config(root, seed=1), GPT).train, n).tokens_BS.tolist() != first


def test_validation_reads_in_file_order_and_counts_each_sample_once(data: Data) -> None:
    assert data.valid is not None
    n = data.valid.num_samples
    tokens = tokens_of(data.folder / "valid")
    assert n == (len(tokens) - 1) // 8
    assert sum(read(data.valid, n).tokens_BS.tolist(), []) == tokens[: n * 8]
    past = read(data.valid, n + 3)
    assert past.tokens_BS.shape == (n + 3, 8)
    assert (past.labels_BS[:n] != IGNORE).all() and (past.labels_BS[n:] == IGNORE).all()
    assert past.samples_B.tolist() == list(range(n + 3))
    assert (read(data.train, data.train.num_samples + 3).labels_BS != IGNORE).all()


def test_last_validation_batch_gives_every_rank_all_its_micro_batches(root: Path) -> None:
    split = open_data(config(root), NEXT_SENTENCE).valid
    assert split is not None
    n = split.num_samples
    size = n - 1
    assert [split.num_batches(k) for k in (1, n, n + 1, size)] == [n, 1, 1, 2]
    seen: list[int] = []
    for rank in range(2):
        micros = list(split.micro_batches(4 * n, dp_rank=rank, dp=2, micro_batch=n, accum_steps=2))
        assert [tuple(m.tokens_BS.shape) for m in micros] == [(n, 8), (n, 8)]
        for m in micros:
            assert m.sentence_B is not None and m.token_types_BS is not None
            assert (m.labels_BS == IGNORE).all() and (m.sentence_B == IGNORE).all()
    for batch in range(split.num_batches(size)):
        m = read(split, size, batch)
        assert m.sentence_B is not None
        real = (m.sentence_B != IGNORE).tolist()
        assert real == (m.labels_BS != IGNORE).any(dim=1).tolist()
        seen += [number for number, counts in zip(m.samples_B.tolist(), real, strict=True) if counts]
    assert seen == list(range(n))


def test_splits_hold_all_documents_each_ended_once(data: Data, root: Path) -> None:
    tokenizer = Tokenizer.from_file(str(data.folder / "tokenizer" / "tokenizer.json"))
    texts = []
    for name in ("train", "valid"):
        tokens = tokens_of(data.folder / name)
        assert tokens[-1] == data.vocabulary.end == 0 and tokens[0] != 0
        document: list[int] = []
        for token in tokens:
            if token == 0:
                texts.append(tokenizer.decode(document))
                document = []
            else:
                document.append(token)
    assert sorted(texts) == sorted(path.read_text() for path in (root / "corpus").iterdir())
    assert data.vocabulary.size == tokenizer.get_vocab_size() <= 300


def test_rows_that_end_with_their_document_are_padded_to_the_longest(root: Path, data: Data) -> None:
    """With variable_length each document's windows hold all of it, and its end is the last target."""
    split = open_data(config(root, variable_length=True), GPT).train
    n = split.num_samples
    batch = read(split, n)
    assert batch.lengths_B is None
    tokens = tokens_of(data.folder / "train")
    assert int((batch.labels_BS != IGNORE).sum()) == len(tokens) - tokens.count(0)
    assert int((batch.labels_BS == 0).sum()) == tokens.count(0)
    for row, labels in zip(batch.tokens_BS.tolist(), batch.labels_BS.tolist(), strict=True):
        length = sum(label != IGNORE for label in labels)
        assert length >= 1 and 0 not in row[:length] and 0 not in labels[: length - 1]
        assert row[1:length] == labels[: length - 1]
        assert labels[length:] == [IGNORE] * (8 - length) and row[length:] == [0] * (8 - length)


@pytest.mark.parametrize(("multiple", "length"), [(1, None), (3, 0), (8, 0), (16, 0)])
@pytest.mark.parametrize("kind", ["gpt", "next"])
def test_a_micro_batch_is_as_long_as_its_longest_row_rounded_up(
    root: Path, kind: str, multiple: int, length: int | None
) -> None:
    split = open_data(config(root, source="random", variable_length=True, seq_len=48), KINDS[kind]).train
    for batch in range(20):
        plain, rounded = read(split, 2, batch), read(split, 2, batch, multiple)
        longest = max(_lengths(plain.labels_BS, plain.lengths_B))
        assert plain.length == longest
        assert rounded.length == -(-longest // multiple) * multiple
        assert torch.equal(rounded.tokens_BS[:, :longest], plain.tokens_BS)
        assert (rounded.tokens_BS[:, longest:] == 0).all() and (rounded.labels_BS[:, longest:] == IGNORE).all()


def _lengths(labels_BS: torch.Tensor, lengths_B: torch.Tensor | None) -> list[int]:
    if lengths_B is not None:
        return lengths_B.tolist()
    return [labels_BS.shape[1]] if (labels_BS == IGNORE).any() else (labels_BS != IGNORE).sum(1).tolist()


def test_random_source_is_reproducible_and_needs_no_files(tmp_path: Path) -> None:
    cfg = config(tmp_path, source="random", vocab_size=50, seq_len=64)
    said: list[str] = []
    prepare(cfg, said.append)
    data = open_data(cfg, GPT)
    assert not data.folder.exists() and said == []
    assert data.vocabulary.size == 50
    rows = [tuple(row) for batch in (0, 10**9) for row in read(data.train, 40, batch).tokens_BS.tolist()]
    assert len(set(rows)) == 80
    assert {token for row in rows for token in row} == set(range(50))


def test_random_tokens_are_pinned(tmp_path: Path) -> None:
    """A changed stream would silently change every recorded curve."""
    split = open_data(config(tmp_path, source="random", vocab_size=50, seq_len=10), GPT).train
    assert read(split, 1).tokens_BS.tolist() == [[9, 8, 49, 6, 3, 25, 17, 46, 5, 20]]


def test_random_rows_of_unequal_length_have_every_length(tmp_path: Path) -> None:
    split = open_data(config(tmp_path, source="random", seq_len=6, variable_length=True), GPT).train
    batch = read(split, 200)
    lengths = (batch.labels_BS != IGNORE).sum(dim=1)
    assert sorted(set(lengths.tolist())) == [1, 2, 3, 4, 5, 6]
    for row, length in zip(batch.labels_BS, lengths.tolist(), strict=True):
        assert (row[:length] != IGNORE).all()


def test_random_splits_and_seeds_differ(tmp_path: Path) -> None:
    cfg = config(tmp_path, source="random", vocab_size=1000)
    data, other = open_data(cfg, GPT), open_data(config(tmp_path, source="random", vocab_size=1000, seed=1), GPT)
    assert data.valid is not None
    assert len({str(read(split, 1).tokens_BS) for split in (data.train, data.valid, other.train)}) == 3
    assert data.fingerprint != other.fingerprint
    assert data.train.num_samples > 10**12
    assert open_data(config(tmp_path, source="random", valid_fraction=0.0), GPT).valid is None


def test_a_test_split_is_read_like_validation_and_shares_no_document(root: Path) -> None:
    cfg = config(root, test_fraction=0.4)
    prepare(cfg, lambda line: None)
    data = open_data(cfg, GPT)
    assert data.test is not None and data.valid is not None
    tokens = {name: tokens_of(data.folder / name) for name in ("train", "valid", "test")}
    n = data.test.num_samples
    assert sum(read(data.test, n).tokens_BS.tolist(), []) == tokens["test"][: n * 8]
    assert (read(data.test, n + 2).labels_BS[n:] == IGNORE).all()
    assert sum(found.count(0) for found in tokens.values()) == 12
    assert open_data(config(root), GPT).test is None
