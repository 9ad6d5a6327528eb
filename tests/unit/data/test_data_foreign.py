"""Megatron prefixes as sources: splits by content, refusals of what does not match."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.config.enums import SampleKind
from engine.data.build.cache import read_meta
from engine.data.build.prepare import prepare
from engine.data.storage.indexed import IndexedFile, IndexedWriter
from tests.unit.data.build_helpers import built, refused
from tests.unit.data.data_options import config

DOCUMENTS = [[5 + i, 6, 7 + i % 3, 0] for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "corpus").mkdir()
    (root / "corpus" / "a.txt").write_text("one two three four\n" * 9)
    prepare(config(root, valid_fraction=0.0), lambda line: None)
    (folder,) = (path for path in (root / "cache").glob("tokenizer-*") if path.is_dir())
    return str(folder)


def prefix(root: Path, documents: Sequence[Sequence[object]], vocab_size: int = 300) -> str:
    """Files as another program leaves them: without sums. A document is a list of ids, or of sequences."""
    with IndexedWriter(root / "old", vocab_size) as writer:
        for document in documents:
            writer.add_document(document if isinstance(document[0], list) else [document])  # type: ignore[arg-type]
    (root / "old.sums.json").unlink()
    return str(root / "old")


def place(ids: Sequence[int]) -> float:
    digest = hashlib.blake2b(np.array(ids, dtype="<u2").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def test_documents_are_split_by_their_tokens_and_not_copied(tmp_path: Path, tokenizer: str) -> None:
    copies = [*DOCUMENTS, *DOCUMENTS[:5]]
    source = prefix(tmp_path, copies)
    said: list[str] = []
    cfg = config(tmp_path, source=source, tokenizer=tokenizer, valid_fraction=0.25, test_fraction=0.25)
    folder = built(cfg, said.append)
    meta = read_meta(folder)
    found = {name: np.load(folder / f"{name}.documents.npy") for name in ("train", "valid", "test")}
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json", "test.documents.npy", "tokenizer", "train.documents.npy", "valid.documents.npy",
    ]  # fmt: skip
    places = np.array([place(ids) for ids in copies])
    assert found["valid"].tolist() == np.flatnonzero(places < 0.25).tolist()
    assert found["test"].tolist() == np.flatnonzero((places >= 0.25) & (places < 0.5)).tolist()
    assert found["train"].tolist() == np.flatnonzero(places >= 0.5).tolist()
    for name, numbers in found.items():
        split = meta["splits"][name]
        assert numbers.dtype == np.int64 and split["documents"] == split["sequences"] == len(numbers)
        assert split["tokens"] == 4 * len(numbers)
    assert meta["prefix"] == source and meta["bytes"] == 4 * 2 * len(copies)
    assert not any("another tokenizer" in line for line in said)
    said.clear()
    assert built(cfg, said.append) == folder and said == [f"data: using {folder}"]


def test_changed_files_make_another_entry(tmp_path: Path, tokenizer: str) -> None:
    cfg = config(tmp_path, source=prefix(tmp_path, DOCUMENTS), tokenizer=tokenizer)
    folder = built(cfg)
    prefix(tmp_path, DOCUMENTS[::-1])
    other = built(cfg)
    assert folder != other
    assert read_meta(folder)["fingerprint"] != read_meta(other)["fingerprint"]


def test_tokenizer_must_be_given(tmp_path: Path) -> None:
    source = prefix(tmp_path, DOCUMENTS)
    message = refused(config(tmp_path, source=source))
    assert f"[OCT452] data.tokenizer=bpe: {source} is a Megatron prefix" in message
    assert "Set data.tokenizer to the tokenizer that made it" in message
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    assert "[OCT452]" in refused(config(tmp_path, blend={str(tmp_path / "corpus"): 1.0, source: 1.0}))


def test_ids_above_the_vocabulary_are_refused(tmp_path: Path, tokenizer: str) -> None:
    source = prefix(tmp_path, [*DOCUMENTS, [299, 0]])
    message = refused(config(tmp_path, source=source, tokenizer=tokenizer))
    assert "[OCT438]" in message and f"{source}.bin has token id 299" in message
    assert "the vocabulary has 2" in message and "data.tokenizer" in message


def test_documents_that_never_end_are_warned_of(tmp_path: Path, tokenizer: str) -> None:
    source = prefix(tmp_path, [ids[:-1] for ids in DOCUMENTS])
    said: list[str] = []
    built(config(tmp_path, source=source, tokenizer=tokenizer), said.append)
    (warning,) = (line for line in said if "another tokenizer may have made it" in line)
    assert f"no document of {source}.bin ends with the token 0" in warning and "--append-eod" in warning


def test_only_the_first_documents_that_fit_in_max_bytes_are_used(tmp_path: Path, tokenizer: str) -> None:
    source = prefix(tmp_path, DOCUMENTS)
    cfg = config(tmp_path, source=source, tokenizer=tokenizer, valid_fraction=0.0, max_bytes=8 * 7 + 7)
    assert np.load(built(cfg) / "train.documents.npy").tolist() == list(range(7))


def test_kinds_that_the_files_cannot_hold_are_refused(tmp_path: Path, tokenizer: str) -> None:
    source = prefix(tmp_path, DOCUMENTS)
    message = refused(config(tmp_path, source=source, tokenizer=tokenizer, kind=SampleKind.rows))
    assert "[OCT455] data.kind=rows" in message and "has no labels" in message and "data.kind=text" in message
    message = refused(config(tmp_path, source=source, tokenizer=tokenizer, kind=SampleKind.completion))
    assert "[OCT455] data.kind=completion" in message and f"document 0 of {source} has 1 sequences" in message
    source = prefix(tmp_path, [[[5, i + 5], [7, 0]] for i in range(20)])
    folder = built(config(tmp_path, source=source, tokenizer=tokenizer, kind=SampleKind.completion))
    assert read_meta(folder)["splits"]["train"]["sequences"] == 2 * read_meta(folder)["splits"]["train"]["documents"]


def test_damage_is_found_when_the_entry_is_used(tmp_path: Path, tokenizer: str) -> None:
    cfg = config(tmp_path, source=prefix(tmp_path, DOCUMENTS), tokenizer=tokenizer)
    folder = built(cfg)
    numbers = np.load(folder / "train.documents.npy")
    np.save(folder / "train.documents.npy", numbers[::-1].copy())
    assert "train.documents.npy is damaged" in refused(cfg)
    assert IndexedFile.open(tmp_path / "old").num_documents == 40


def test_empty_split_is_refused(tmp_path: Path, tokenizer: str) -> None:
    cfg = config(tmp_path, source=prefix(tmp_path, DOCUMENTS), tokenizer=tokenizer, valid_fraction=1e-9)
    assert "[OCT415] data.valid_fraction=1e-09" in refused(cfg)
