"""Micro-batches of a prepared corpus and of the random source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config.schema import DataConfig
from engine.data import Data, MicroBatch, Split, load_tokenizer, open_data, prepare
from engine.data.dataset import TokenSamples
from engine.data.tokens import TokenFile, TokenWriter
from engine.errors import DataError

Step = tuple[tuple[int, ...], ...]


def config(root: Path, **changes: object) -> DataConfig:
    options: dict[str, object] = {
        "source": str(root / "corpus"),
        "seq_len": 8,
        "vocab_size": 300,
        "valid_fraction": 0.3,
    }
    return DataConfig(**{**options, "cache_dir": str(root / "cache"), **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "corpus").mkdir()
    for i in range(12):
        (root / "corpus" / f"{i:02}.txt").write_text(f"document {i} has number {i * i}\n" * (2 + i % 3))
    prepare(config(root), lambda line: None)
    return root


@pytest.fixture(scope="module")
def data(root: Path) -> Data:
    return open_data(config(root))


def step(split: Split, batch: int, dp: int, micro: int, accum: int) -> Step:
    """Rows of one global batch, tokens followed by the last label, in no particular order."""
    rows = []
    for rank in range(dp):
        micros = list(split.micro_batches(batch, dp_rank=rank, dp=dp, micro_batch=micro, accum_steps=accum))
        assert [m.tokens_BS.shape[0] for m in micros] == [micro] * accum
        rows += [(*t, n[-1]) for m in micros for t, n in zip(m.tokens_BS.tolist(), m.labels_BS.tolist(), strict=True)]
    return tuple(sorted(rows))


def only(split: Split, batch: int) -> MicroBatch:
    (micro,) = split.micro_batches(batch, dp_rank=0, dp=1, micro_batch=1, accum_steps=1)
    return micro


def test_labels_are_the_tokens_one_later(data: Data) -> None:
    for split in (data.train, data.valid):
        assert split is not None
        (micro,) = split.micro_batches(0, dp_rank=0, dp=1, micro_batch=3, accum_steps=1)
        assert micro.tokens_BS.shape == micro.labels_BS.shape == (3, 8)
        assert micro.tokens_BS.dtype == micro.labels_BS.dtype == torch.int64
        assert micro.tokens_BS.is_contiguous() and micro.labels_BS.is_contiguous()
        assert torch.equal(micro.tokens_BS[:, 1:], micro.labels_BS[:, :-1])


@pytest.mark.parametrize(("dp", "micro", "accum"), [(1, 1, 12), (2, 3, 2), (4, 3, 1), (3, 2, 2), (12, 1, 1)])
def test_a_step_has_the_same_rows_in_every_layout(data: Data, dp: int, micro: int, accum: int) -> None:
    for batch in (0, 3):
        assert step(data.train, batch, dp, micro, accum) == step(data.train, batch, 1, 12, 1)


def test_training_reads_every_sample_once_per_epoch_in_another_order(data: Data, root: Path) -> None:
    samples = TokenSamples(TokenFile.open(data.folder / "train.tokens"), 8)
    expected = sorted(samples.window(i).tolist()[:8] for i in range(samples.num_samples))
    n = data.train.num_samples
    first, second = ([only(data.train, e * n + i).tokens_BS[0].tolist() for i in range(n)] for e in (0, 1))
    assert sorted(first) == sorted(second) == expected
    assert first != second
    reseeded = open_data(config(root, seed=1))
    assert [only(reseeded.train, i).tokens_BS[0].tolist() for i in range(n)] != first


def test_validation_reads_in_file_order_and_wraps_around(data: Data) -> None:
    assert data.valid is not None
    n = data.valid.num_samples
    tokens = TokenFile.open(data.folder / "valid.tokens").tokens.astype("int64").tolist()
    assert n == (len(tokens) - 1) // 8
    read = [only(data.valid, i).tokens_BS[0].tolist() for i in range(n + 1)]
    assert sum(read[:n], []) == tokens[: n * 8]
    assert read[n] == read[0]


def test_splits_hold_all_documents_each_ended_once(data: Data, root: Path) -> None:
    tokenizer = load_tokenizer(data.folder / "tokenizer.json")
    texts = []
    for name in ("train.tokens", "valid.tokens"):
        tokens = TokenFile.open(data.folder / name).tokens.tolist()
        assert tokens[-1] == 0 and tokens[0] != 0
        document: list[int] = []
        for token in tokens:
            if token == 0:
                texts.append(tokenizer.decode(document))
                document = []
            else:
                document.append(token)
    assert sorted(texts) == sorted(path.read_text() for path in (root / "corpus").iterdir())
    assert data.vocab_size == tokenizer.get_vocab_size() <= 300


def test_token_file_shorter_than_a_sample_is_refused_with_the_nearest_length(root: Path, tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a.tokens", 300) as writer:
        writer.append(range(10))
    file = TokenFile.open(tmp_path / "a.tokens")
    assert TokenSamples(file, 9).num_samples == 1
    for seq_len, legal in ((10, 9), (0, 1)):
        with pytest.raises(DataError) as caught:
            TokenSamples(file, seq_len)
        message = str(caught.value)
        assert f"[OCT411] data.seq_len={seq_len}" in message
        assert f"needs data.seq_len + 1 = {seq_len + 1} tokens" in message and "has 10" in message
        assert f"Nearest legal: data.seq_len={legal}" in message
    with pytest.raises(DataError, match=r"OCT411.*valid\.tokens|OCT411.*train\.tokens"):
        open_data(config(root, seq_len=100_000))


def test_random_source_is_reproducible_layout_free_and_needs_no_files(tmp_path: Path) -> None:
    cfg = config(tmp_path, source="random", vocab_size=50, seq_len=64)
    said: list[str] = []
    folder = prepare(cfg, said.append)
    data = open_data(cfg)
    assert folder == data.folder and not folder.exists() and said == []
    assert data.vocab_size == 50
    assert step(data.train, 9, 2, 2, 3) == step(open_data(cfg).train, 9, 4, 3, 1)
    rows = [*step(data.train, 0, 1, 40, 1), *step(data.train, 10**9, 1, 40, 1)]
    assert len(set(rows)) == 80
    assert {token for row in rows for token in row} == set(range(50))


def test_random_splits_and_seeds_differ(tmp_path: Path) -> None:
    cfg = config(tmp_path, source="random", vocab_size=1000)
    data, other = open_data(cfg), open_data(config(tmp_path, source="random", vocab_size=1000, seed=1))
    assert data.valid is not None
    assert len({step(split, 0, 1, 1, 1) for split in (data.train, data.valid, other.train)}) == 3
    assert data.fingerprint != other.fingerprint
    assert data.train.num_samples > 10**12
    assert open_data(config(tmp_path, source="random", valid_fraction=0.0)).valid is None
