"""Indexed token files: what is written is read back, and nothing else is left behind."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.storage import indexed
from engine.data.storage.indexed import IndexedFile, IndexedWriter, merge, token_dtype
from engine.errors import DataError
from tests.unit.data.indexed_samples import DOCUMENTS, SHAPES, VOCABULARIES, contents, three, write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("vocab_size", "name"), [(2, "uint16"), (65_536, "uint16"), (65_537, "int32")])
def test_dtype_switches_above_65536_entries_and_holds_the_last_id(tmp_path: Path, vocab_size: int, name: str) -> None:
    write(tmp_path / "a", [[[0, vocab_size - 1]]], vocab_size)
    file = IndexedFile.open(tmp_path / "a")
    assert token_dtype(vocab_size).name == file.dtype.name == file.tokens.dtype.name == name
    assert file.tokens.tolist() == [0, vocab_size - 1]
    file.verify(vocab_size=vocab_size)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_documents_and_sequences_are_read_back(tmp_path: Path, shape: str, vocabulary: str) -> None:
    writer = write(tmp_path / "v1.2", SHAPES[shape], VOCABULARIES[vocabulary])
    file = IndexedFile.open(tmp_path / "v1.2")
    assert contents(file) == SHAPES[shape]
    flat = [[token for part in document for token in part] for document in SHAPES[shape]]
    assert [file.document(i).tolist() for i in range(file.num_documents)] == flat
    assert file.document_starts.tolist() == [0, *np.cumsum([len(document) for document in flat]).tolist()]
    assert (writer.num_documents, writer.num_tokens) == (len(flat), sum(map(len, flat)))
    assert (file.num_documents, file.num_tokens) == (writer.num_documents, writer.num_tokens)
    assert file.contiguous and file.digest == writer.digest != ""
    assert (file.lengths.dtype, file.pointers.dtype, file.documents.dtype) == (np.int32, np.int64, np.int64)


def test_documents_may_all_be_empty(tmp_path: Path) -> None:
    for documents in ([[]], [[[]], []]):
        write(tmp_path / "a", documents)
        file = IndexedFile.open(tmp_path / "a")
        file.verify(vocab_size=300)
        assert contents(file) == documents and file.num_tokens == 0
        assert file.document_starts.tolist() == [0] * (len(documents) + 1)


def test_layout_is_the_documented_one(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2], [3]], [[4]]])
    content, index, _ = three(tmp_path / "a")
    assert content == struct.pack("<4H", 1, 2, 3, 4)
    assert index == struct.pack("<9sQBQQ3i3q3q", b"MMIDIDX\0\0", 1, 8, 3, 3, 2, 1, 1, 0, 4, 6, 0, 2, 3)


def test_maps_are_read_only_and_numbers_outside_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    file = IndexedFile.open(tmp_path / "a")
    for array in (file.tokens, file.lengths, file.pointers, file.documents):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    for call, number in ((file.document, -1), (file.document, 5), (file.sequence, -1), (file.sequence, 7)):
        with pytest.raises(IndexError, match=f" {number} of "):
            call(number)


@pytest.mark.parametrize("kind", ["list", "tuple", "uint16", "int32", "int64", "uint64"])
def test_the_kind_of_sequence_does_not_matter(tmp_path: Path, kind: str) -> None:
    documents = SHAPES["several"]
    expected = write(tmp_path / "a", documents)
    with IndexedWriter(tmp_path / "b", 300) as writer:
        for document in documents:
            make = {"list": list, "tuple": tuple}.get(kind, lambda part: np.array(part, kind))
            writer.add_document([make(part) for part in document])
    assert three(tmp_path / "a") == three(tmp_path / "b") and writer.digest == expected.digest


def test_a_buffer_may_be_used_again_after_it_was_added(tmp_path: Path) -> None:
    buffer = np.zeros(3, np.uint16)
    with IndexedWriter(tmp_path / "a", 300) as writer:
        for i in range(4):
            buffer[:] = i
            writer.add_document([buffer])
    assert contents(IndexedFile.open(tmp_path / "a")) == [[[i] * 3] for i in range(4)]


def test_files_longer_than_staging_and_checksum_blocks(tmp_path: Path) -> None:
    """12 M tokens of int32: three checksum blocks, the last one short."""
    tokens = np.random.default_rng(0).integers(0, 70_000, 12_000_001)
    with IndexedWriter(tmp_path / "a", 70_000) as writer:
        writer.add_document([tokens[:1], tokens[1:9_000_000]])
        writer.add_document([tokens[9_000_000:]])
    file = IndexedFile.open(tmp_path / "a")
    assert np.array_equal(file.tokens, tokens) and file.lengths.tolist() == [1, 8_999_999, 3_000_001]
    shown: list[tuple[int, int]] = []
    file.verify(lambda done, total: shown.append((done, total)))
    assert shown == [(min(i << 24, 48_000_004), 48_000_004) for i in (1, 2, 3)]


BAD = [[-1], [300], [2**70], [1.5], ["a"], np.array([1.0]), np.array([[1]]), np.array([2**63], np.uint64)]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_writer_refuses_what_is_no_id_of_the_vocabulary_and_leaves_nothing(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ValueError, match="token ids"), IndexedWriter(tmp_path / "a", 300) as writer:
        writer.add_document([[1, 2]])
        writer.add_document([bad])
    assert names(tmp_path) == []


def test_a_refusal_that_the_caller_swallowed_is_raised_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a sequence"), IndexedWriter(tmp_path / "a", 300) as writer:
        with pytest.raises(ValueError, match="not a sequence"):
            writer.add_document([[1], ["a"]])
        writer.add_document([[2]])
    assert names(tmp_path) == []


def test_final_names_appear_only_at_the_end_and_what_was_there_stays_until_then(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", 300) as writer:
        writer.add_document([[1]])
        assert names(tmp_path) == ["a.bin.tmp"]
    assert names(tmp_path) == ["a.bin", "a.idx", "a.sums.json"]
    before = three(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "a", 300) as writer:
        writer.add_document([[2]])
        raise KeyboardInterrupt
    assert three(tmp_path / "a") == before and len(names(tmp_path)) == 3


def test_names_appear_in_order_and_a_failed_rename_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    rename = os.replace

    def fail_at_last(source: Path, target: Path) -> None:
        seen.append(target.name)
        if len(seen) == 3:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("engine.data.storage.files.os.replace", fail_at_last)
    with pytest.raises(DataError, match=r"OCT439.*Input/output error"):
        write(tmp_path / "a", DOCUMENTS)
    assert seen == ["a.bin", "a.idx", "a.sums.json"] and names(tmp_path) == []


@pytest.mark.parametrize("cut", [0, 1, 3])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_merged_files_are_byte_for_byte_those_of_one_writer(tmp_path: Path, vocabulary: str, cut: int) -> None:
    vocab_size = VOCABULARIES[vocabulary]
    documents = [*DOCUMENTS, *SHAPES["several"]]
    whole = write(tmp_path / "whole", documents, vocab_size)
    for i, part in enumerate((documents[:cut], documents[cut:7], documents[7:])):
        write(tmp_path / f"part{i}", part, vocab_size)
    merge([tmp_path / f"part{i}" for i in range(3)], tmp_path / "merged", vocab_size)
    assert three(tmp_path / "merged") == three(tmp_path / "whole")
    assert IndexedFile.open(tmp_path / "merged").digest == whole.digest


def test_merge_refuses_a_damaged_part_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.bin").write_bytes(bytes((tmp_path / "a.bin").stat().st_size))
    with pytest.raises(DataError, match=r"OCT437.*a\.bin is damaged"):
        merge([tmp_path / "a"], tmp_path / "b", 300)
    assert len(names(tmp_path)) == 3


def test_merge_of_a_file_whose_sequences_have_gaps(tmp_path: Path) -> None:
    gapped(tmp_path / "a")
    file = IndexedFile.open(tmp_path / "a")
    assert not file.contiguous and contents(file) == [[[1], [3, 4]], [[5]]]
    assert [file.document(i).tolist() for i in range(2)] == [[1, 3, 4], [5]]
    merge([tmp_path / "a"], tmp_path / "b", 300)
    write(tmp_path / "c", [[[1], [3, 4]], [[5]]])
    assert three(tmp_path / "b") == three(tmp_path / "c")


def gapped(prefix: Path) -> None:
    """Five tokens, of which the second belongs to no sequence."""
    prefix.with_name(prefix.name + ".bin").write_bytes(struct.pack("<5H", 1, 2, 3, 4, 5))
    index = struct.pack("<9sQBQQ3i3q3q", b"MMIDIDX\0\0", 1, 8, 3, 3, 1, 2, 1, 0, 4, 8, 0, 2, 3)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)


class FullDisk:
    """A file that takes `left` writes and then finds the disk full."""

    def __init__(self, file: Any, code: int, left: int) -> None:
        self._file, self._code, self._left = file, code, left

    def write(self, content: bytes) -> int:
        if not self._left:
            raise OSError(self._code, os.strerror(self._code))
        self._left -= 1
        return self._file.write(content)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(("which", "left"), [("a.bin.tmp", 1), ("a.idx.tmp", 0), ("a.sums.json.tmp", 0)])
def test_a_full_disk_leaves_nothing_and_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, left: int, code: int
) -> None:
    def full(path: Path, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115 - the writer closes it
        return FullDisk(file, code, left) if path.name == which else file

    monkeypatch.setattr(indexed, "open", full, raising=False)
    monkeypatch.setattr(indexed, "_STAGED_TOKENS", 4)
    with pytest.raises(DataError) as caught:
        write(tmp_path / "a", SHAPES["single"])
    message = str(caught.value)
    assert f"[OCT439] data.cache_dir={tmp_path}: {tmp_path / 'a'} cannot be written ({os.strerror(code)})" in message
    assert f") after 0.0 MB; free in {tmp_path}: " in message
    assert "Free space there, or set data.cache_dir to a folder with more" in message
    assert names(tmp_path) == []


FILL = """
import resource, sys
from pathlib import Path
import numpy as np
from engine.data.storage.indexed import IndexedWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
with IndexedWriter(Path(sys.argv[1]), 300) as writer:
    for _ in range(100):
        writer.add_document([np.zeros(100_000, np.uint16)])
"""


def test_a_real_limit_on_file_size_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL, str(tmp_path / "a")]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and names(tmp_path) == []
    assert f"[OCT439] data.cache_dir={tmp_path}" in done.stderr and "cannot be written (File too large)" in done.stderr


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"OCT439.*no/a cannot be written \(No such file or directory\)"):
        write(tmp_path / "no" / "a", DOCUMENTS)
