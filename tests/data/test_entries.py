"""Cache entries: what makes another one, damage, splits without documents, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine.data.build.cache import cache_root, entries, read_meta
from engine.data.corpus.documents import Document, split_position
from engine.errors import DataError
from tests.unit.data.build_helpers import built, content, counts, make_corpus, refused
from tests.unit.data.data_options import config


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_corpus(tmp_path, 12)


def test_another_corpus_or_option_makes_another_entry(root: Path) -> None:
    changes = [{}, {"vocab_size": 270}, {"valid_fraction": 0.4}, {"test_fraction": 0.2}, {"max_bytes": 700}]
    folders = [built(config(root, **change)) for change in changes]
    (root / "corpus" / "new.txt").write_text("one more document")
    folders.append(built(config(root)))
    assert len(set(folders)) == 6


def test_half_entry_is_built_anew(root: Path) -> None:
    folder = built(config(root))
    complete = content(folder)
    (folder / "meta.json").unlink()
    (folder / "train.bin").write_bytes(b"half")
    (folder / "train.bin.tmp").write_bytes(b"half")
    assert built(config(root)) == folder
    assert content(folder) == complete


@pytest.mark.parametrize(
    ("name", "code"),
    [("train.bin", 437), ("valid.idx", 437), ("valid.sums.json", 413), ("tokenizer/tokenizer.json", 413)],
)
def test_flipped_byte_in_any_file_is_refused(root: Path, name: str, code: int) -> None:
    folder = built(config(root))
    damaged = bytearray((folder / name).read_bytes())
    damaged[-2] ^= 1
    (folder / name).write_bytes(damaged)
    message = refused(config(root))
    assert f"[OCT{code}] data.cache_dir={folder}" in message
    assert f"{folder / name.partition('/')[0]} is damaged" in message
    assert f"Delete the folder {folder}; the next run builds it again" in message


def test_meta_file_that_is_no_json_or_lacks_a_field_is_refused(root: Path) -> None:
    folder = built(config(root))
    meta = json.loads((folder / "meta.json").read_text())
    del meta["vocab_size"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert re.search(r"OCT413.*meta\.json cannot be read \(KeyError\('vocab_size'\)\)", refused(config(root)))
    (folder / "meta.json").write_text("{")
    assert re.search(r"OCT413.*meta\.json cannot be read", refused(config(root)))


def test_files_of_another_entry_are_refused(root: Path) -> None:
    folder, other = built(config(root)), built(config(root, valid_fraction=0.5))
    for name in ("train.bin", "train.idx", "train.sums.json"):
        (folder / name).write_bytes((other / name).read_bytes())
    message = refused(config(root))
    assert "[OCT413]" in message and "train.sums.json is damaged" in message and "meta.json records" in message


def test_swapped_tokenizer_is_found(root: Path) -> None:
    """In the entry, and in the cache's own folder of tokenizers, whose digest is part of the entry's name."""
    folder, other = built(config(root)), built(config(root, vocab_size=280))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).write_bytes((other / "tokenizer" / name).read_bytes())
    message = refused(config(root))
    assert f"[OCT413] data.cache_dir={folder}" in message and f"{folder / 'tokenizer'} is damaged" in message
    one, two = (path for path in (root / "cache").glob("tokenizer-*") if path.is_dir())
    (one / "tokenizer.json").write_bytes((two / "tokenizer.json").read_bytes())
    messages = []
    for size in (300, 280):
        try:
            entries(config(root, vocab_size=size))
        except DataError as error:
            messages.append(str(error))
    assert len(messages) == 1
    assert f"[OCT413] data.cache_dir={one}: {one} is damaged" in messages[0]
    assert f"Delete the folder {one}" in messages[0]


def test_given_tokenizer_that_changed_makes_another_entry(root: Path) -> None:
    given = root / "given"
    built(config(root))
    (made,) = (path for path in (root / "cache").glob("tokenizer-*") if path.is_dir())
    made.rename(given)
    folder = built(config(root, tokenizer=str(given)))
    assert built(config(root, tokenizer=str(given))) == folder
    path = given / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    assert built(config(root, tokenizer=str(given))) != folder


def test_opening_what_was_never_prepared_is_refused(root: Path) -> None:
    with pytest.raises(DataError) as caught:
        entries(config(root))
    message = str(caught.value)
    assert f"[OCT412] data.cache_dir={root / 'cache'}" in message
    assert "has no finished entry tokenizer-" in message and "the tokenizer was not prepared" in message
    assert "Start the run again" in message


def test_cache_folder_that_cannot_be_written_is_refused(root: Path) -> None:
    (root / "file").write_text("in the way")
    message = refused(config(root, cache_dir=str(root / "file" / "cache")))
    assert f"[OCT414] data.cache_dir={root / 'file' / 'cache'}" in message
    assert "cannot be written" in message and "Not a directory" in message
    assert "XDG_CACHE_HOME" in message


def test_cache_folder_defaults(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root(config(root, cache_dir=None)) == Path("/xdg/octant")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_root(config(root, cache_dir=None)) == Path("/home/someone/.cache/octant")
    assert cache_root(config(root, cache_dir="~/mine")) == Path("/home/someone/mine")


def nearest(message: str, option: str) -> float:
    found = re.search(rf"Nearest legal: data\.{option}=([\d.]+); \S+=0 .*means no", message)
    assert found is not None, message
    return float(found.group(1))


def test_empty_validation_split_is_refused_and_the_named_fraction_works(root: Path) -> None:
    lowest = min(split_position(Document("", (p.read_text(),))) for p in (root / "corpus").iterdir())
    message = refused(config(root, valid_fraction=lowest / 2))
    assert f"[OCT415] data.valid_fraction={lowest / 2}" in message
    assert "puts all 12 documents of" in message and "the validation split is empty" in message
    assert counts(built(config(root, valid_fraction=nearest(message, "valid_fraction")))) == {"train": 11, "valid": 1}


def test_empty_test_split_is_refused_and_the_named_fraction_works(root: Path) -> None:
    message = refused(config(root, test_fraction=1e-9))
    assert "[OCT415] data.test_fraction=1e-09" in message and "the test split is empty" in message
    before = counts(built(config(root)))
    found = counts(built(config(root, test_fraction=nearest(message, "test_fraction"))))
    assert found == {"train": before["train"] - 1, "valid": before["valid"], "test": 1}


def test_empty_training_split_is_refused_and_the_named_fraction_works(root: Path) -> None:
    message = refused(config(root, valid_fraction=1.0))
    assert "[OCT416] data.valid_fraction=1.0" in message and "the training split is empty" in message
    assert counts(built(config(root, valid_fraction=nearest(message, "valid_fraction")))) == {"train": 1, "valid": 11}
    message = refused(config(root, test_fraction=0.7))
    assert "[OCT416] data.test_fraction=0.7" in message
    found = counts(built(config(root, test_fraction=nearest(message, "test_fraction"))))
    assert found["train"] == 1 and sum(found.values()) == 12


def test_single_document_can_only_train(root: Path) -> None:
    message = refused(config(root, source=str(root / "corpus" / "00.txt"), valid_fraction=0.000001))
    assert "[OCT415]" in message and message.endswith(
        "Nearest legal: data.valid_fraction=0 train.eval_batches=0 (no validation)"
    )
    message = refused(config(root, source=str(root / "corpus" / "00.txt"), valid_fraction=1.0))
    assert "[OCT416]" in message and message.endswith("(nothing held out)")


def test_corpus_and_vocabulary_refusals_come_through(root: Path) -> None:
    (root / "blank").mkdir()
    (root / "blank" / "a.txt").write_text("")
    assert "[OCT403] data.source=" in refused(config(root, source=str(root / "blank")))
    assert "[OCT401] data.source=" in refused(config(root, source=str(root / "nowhere")))
    assert "[OCT405] data.vocab_size=100" in refused(config(root, vocab_size=100))


def test_given_files_of_one_name_are_told_apart_by_their_content(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root))
    digests = []
    for name, size in (("a", 270), ("b", 280)):
        (root / name).mkdir()
        made = built(config(root, vocab_size=size)) / "tokenizer" / "tokenizer.json"
        (root / name / "mine.json").write_bytes(made.read_bytes())
        for path in (str(root / name / "mine.json"), f"~/{name}/mine.json"):
            folder = built(config(root, tokenizer=path, vocab_size=300))
            digests.append(read_meta(folder)["tokenizer"])
    assert len(set(digests)) == 2 and digests[0] == digests[1] != digests[2] == digests[3]
