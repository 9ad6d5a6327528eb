"""Mistakes, damage and full disks as users meet them: each is refused with a way out that works, or survived."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from build_helpers import built, content, counts, make_corpus, quiet, refused
from data_options import config

from engine.config.enums import BadFiles, SampleKind
from engine.config.load import load
from engine.config.rules import check
from engine.data import commands
from engine.data.build import lock
from engine.data.build import prepare as build
from engine.data.build.cache import cache_root, read_meta
from engine.data.build.lock import Timing, builder_lock
from engine.data.build.prepare import prepare
from engine.data.commands import main
from engine.data.corpus import listing
from engine.data.storage.indexed import IndexedWriter
from engine.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_corpus(tmp_path, 12)


def no_space(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_any_changed_byte_of_the_meta_file_is_found(root: Path) -> None:
    path = built(config(root)) / "meta.json"
    whole = path.read_bytes()
    for field in (b'"fingerprint": "', b'"end": ', b'"bytes": ', b'"files": ', b'"valid": ', b'"digest": "'):
        place = whole.index(field) + len(field) - 3
        for at in (place, place + 4):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            message = refused(config(root))
            assert f"[OCT413] data.cache_dir={path.parent}: {path} " in message, (field, message)
            assert f"Delete the folder {path.parent}" in message
    path.write_bytes(whole)
    assert read_meta(path.parent)["kind"] == "text"


def test_bad_files_stop_is_not_satisfied_by_what_skip_built(root: Path) -> None:
    (root / "corpus" / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    built(config(root))
    message = refused(config(root, bad_files=BadFiles.stop))
    assert "[OCT440] data.bad_files=stop" in message and "bad.txt: is not UTF-8: byte 0xff" in message
    assert "use data.bad_files=skip" in message


def test_way_out_of_a_single_document_is_a_legal_training(root: Path) -> None:
    message = refused(config(root, source=str(root / "corpus" / "00.txt"), valid_fraction=0.000001))
    assert "puts the only document of" in message
    way_out = message.partition("Nearest legal: ")[2].partition(" (")[0].split()
    assert not check(load(["data=text", f"data.source={root}", *way_out]), 1)


def test_parquet_text_that_is_not_utf8_is_left_out(root: Path) -> None:
    buffers = pa.array([b"good", b"bad \xff", b"fine"]).buffers()
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, buffers)})
    pq.write_table(table, root / "a.parquet")
    folder = built(config(root, source=str(root / "a.parquet"), valid_fraction=0))
    assert counts(folder) == {"train": 2}
    ((path, reason),) = read_meta(folder)["problems"]
    assert path.endswith("a.parquet, row 2") and reason == "is not UTF-8 (invalid start byte at offset 4 of a text)"


@pytest.mark.parametrize("kind", [SampleKind.text, SampleKind.rows])
def test_folders_that_cannot_be_listed_are_problems(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: SampleKind
) -> None:
    walk = os.walk

    def closed(top: Path, onerror: Any) -> Iterator[Any]:
        onerror(PermissionError(13, "Permission denied", str(root / "corpus" / "private")))
        return walk(top)

    (root / "corpus" / "private").mkdir()
    (root / "corpus" / "a.jsonl").write_text('{"text": "a", "label": 1}\n')
    monkeypatch.setattr(listing.os, "walk", closed)
    folder = built(config(root, valid_fraction=0, kind=kind))
    ((path, reason),) = read_meta(folder)["problems"]
    assert path.endswith("corpus/private") and reason.startswith("cannot be read (")


def test_source_without_documents_is_told_what_would_help(root: Path) -> None:
    (root / "corpus" / "bad.txt").write_bytes(b"\xff")
    message = refused(config(root, source=str(root / "corpus" / "bad.txt")))
    assert "[OCT403]" in message and "max_bytes" not in message
    assert message.endswith("Give text files in UTF-8, or records with text")
    assert "or a larger data.max_bytes" in refused(config(root, max_bytes=1, kind=SampleKind.rows, source=str(root)))


def test_megatron_files_that_are_misnamed_or_alone_are_told_of(root: Path) -> None:
    with IndexedWriter(root / "x", 300) as writer:
        writer.add_document([[1, 200, 255]])
    assert f"Give {root / 'x'}, the prefix of" in refused(config(root, source=str(root / "x.bin")))
    (root / "x.idx").unlink()
    message = refused(config(root, source=str(root / "x")))
    assert "[OCT401]" in message and f"lacks {root / 'x'}.idx. Put x.idx beside x.bin" in message


def test_paths_too_long_for_any_file_are_refused(root: Path) -> None:
    assert "[OCT401] data.source=xxx" in refused(config(root, source="x" * 5000))
    assert "[OCT446] data.tokenizer=xxx" in refused(config(root, tokenizer="x" * 5000))


def test_tokenizers_that_are_empty_or_unreadable_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "given").mkdir()
    (root / "given" / "vocab.json").write_text("{}")
    (root / "given" / "merges.txt").write_text("")
    message = refused(config(root, tokenizer=str(root / "given")))
    assert "[OCT447]" in message and "its vocabulary is empty" in message
    assert "[OCT446] data.tokenizer=~nobody-here/x" in refused(config(root, tokenizer="~nobody-here/x"))
    monkeypatch.setattr("engine.data.build.cache.file_digest", no_space)
    assert "[OCT447] data.tokenizer=" in refused(config(root, tokenizer=str(root / "given")))


def test_vocabulary_too_large_to_train_is_refused_before_memory_is(root: Path) -> None:
    for spec in ("bpe", "wordpiece"):
        message = refused(config(root, tokenizer=spec, vocab_size=10**10))
        assert "[OCT405] data.vocab_size=10000000000" in message
        assert message.endswith("at most 16777216 entries. Nearest legal: data.vocab_size=16777216")


def test_user_without_a_home_folder_must_name_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    for given in (None, "", "~/cache"):
        with pytest.raises(DataError, match=r"\[OCT414\] data\.cache_dir=.*home directory.*to a full path"):
            cache_root(config(root, cache_dir=given))


def test_full_disk_leaves_no_owner_to_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "entry"
    monkeypatch.setattr(lock, "_put", no_space)
    with pytest.raises(OSError, match="No space"), builder_lock(folder, quiet, 60):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]
    monkeypatch.undo()
    said: list[str] = []
    with builder_lock(folder, said.append, 60, Timing(stale_s=1e9)):
        assert said == []


def test_nobody_is_told_to_wait_for_a_dead_process(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "entry.owner").write_text(json.dumps({"machine": lock.machine(), "pid": dead.pid, "token": "t"}))
    said: list[str] = []
    with builder_lock(tmp_path / "entry", said.append, 60):
        assert said == [f"data: the process that built {tmp_path / 'entry'} is gone; taking over"]


def test_what_a_failed_build_had_merged_is_removed_and_its_shards_stay(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])

    monkeypatch.setattr(build, "write_json", full)
    message = refused(config(root, tokenizer="bpe"))
    assert (
        message.startswith("1. [OCT414]") and "cannot be written ([Errno 28] No space left on device: 'b')" in message
    )
    monkeypatch.undo()
    monkeypatch.setattr(build, "_facts", no_space)
    assert "[OCT414]" in refused(config(root))
    left = {Path(name).parts[-2] for name in content(root / "cache") if ".partial" in name}
    assert left == {"shard-00000"}


def test_output_that_nobody_reads_ends_no_build(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"source={root / 'corpus'}", f"cache_dir={root / 'cache'}", "valid_fraction=0.3", "vocab_size=300"]
    keep = os.dup(1)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.dup2(writer, 1)
        with open(1, "w", closefd=False) as stdout, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", stdout)
            assert commands.build(words) == 0
    finally:
        os.dup2(keep, 1)
        os.close(keep)
        os.close(writer)
    assert capfd.readouterr().err == ""
    prepare(config(root), quiet, shard_bytes=1 << 20)
    assert len(list((root / "cache").glob("*/meta.json"))) == 1


def test_prefix_with_an_equals_sign_can_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a=b").mkdir()
    with IndexedWriter(tmp_path / "a=b" / "x", 300) as writer:
        writer.add_document([[1, 2, 3]])
    assert main(["verify", str(tmp_path / "a=b" / "x")]) == 0
    assert json.dumps("all ok")[1:-1] in capsys.readouterr().out
