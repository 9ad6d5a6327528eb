"""Token files: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from engine.data.tokens import TokenFile, TokenWriter, token_dtype
from engine.errors import DataError

IDS = [0, 5, 299, 7, 0, 1]


def write(path: Path, vocab_size: int = 300, ids: list[int] | None = None) -> Path:
    with TokenWriter(path, vocab_size) as writer:
        for token in ids or IDS:
            writer.append([token])
    return path


def refused(path: Path, code: int) -> str:
    with pytest.raises(DataError) as caught:
        TokenFile.open(path).verify()
    message = str(caught.value)
    assert f"[OCT{code}] data.cache_dir={path.parent}" in message
    assert str(path) in message
    assert f"Delete the folder {path.parent}; the next run builds it again" in message
    return message


@pytest.mark.parametrize(("vocab_size", "width"), [(2, 2), (65_535, 2), (65_536, 2), (65_537, 4), (200_000, 4)])
def test_dtype_switches_above_65536_entries_and_holds_the_last_id(tmp_path: Path, vocab_size: int, width: int) -> None:
    assert token_dtype(vocab_size).itemsize == width
    path = write(tmp_path / "a.tokens", vocab_size, [0, vocab_size - 1])
    file = TokenFile.open(path)
    assert file.tokens.tolist() == [0, vocab_size - 1]
    assert (file.count, file.vocab_size) == (2, vocab_size)
    assert path.stat().st_size == 32 + 2 * width


def test_layout_is_the_documented_one(tmp_path: Path) -> None:
    content = write(tmp_path / "a.tokens").read_bytes()
    assert content == struct.pack("<8sIIQQ6H", b"OCTOKENS", 1, 2, 6, 300, *IDS)


def test_equal_tokens_have_equal_digests_however_they_were_appended(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    with TokenWriter(tmp_path / "b.tokens", 300) as writer:
        writer.append(np.array(IDS))
    assert TokenFile.open(path).verify() == writer.digest
    assert TokenFile.open(write(tmp_path / "c.tokens", ids=[1])).verify() != writer.digest


def test_map_is_read_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        TokenFile.open(write(tmp_path / "a.tokens")).tokens[0] = 1


@pytest.mark.parametrize("bad", [-1, 300])
def test_writer_refuses_ids_outside_the_vocabulary_and_leaves_nothing(tmp_path: Path, bad: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0 \.\. 299"), TokenWriter(tmp_path / "a.tokens", 300) as writer:
        writer.append([1, 2])
        writer.append([bad])
    assert list(tmp_path.iterdir()) == []


def test_final_name_appears_only_when_the_writer_is_done(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a.tokens", 300) as writer:
        writer.append(IDS)
        assert not (tmp_path / "a.tokens").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tokens", "a.tokens.json"]


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "a.tokens", 407)


@pytest.mark.parametrize("content", [b"", b"OCTOKENS", b"\x93NUMPY\x01\x00" + bytes(100)])
def test_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tokens"
    path.write_bytes(content)
    assert "is not a token file: it does not start with OCTOKENS" in refused(path, 408)


@pytest.mark.parametrize(("version", "width", "count"), [(2, 2, 6), (1, 3, 6), (1, 2, 0)])
def test_other_versions_widths_and_empty_files_are_refused(
    tmp_path: Path, version: int, width: int, count: int
) -> None:
    path = tmp_path / "a.tokens"
    path.write_bytes(struct.pack("<8sIIQQ", b"OCTOKENS", version, width, count, 300) + bytes(width * count))
    message = refused(path, 408)
    assert f"has version {version}, {width} bytes per token, {count} tokens" in message
    assert "legal are version 1, 2 or 4 bytes, 1 or more tokens" in message


@pytest.mark.parametrize("change", [-1, -12, 2])
def test_truncated_and_grown_files_are_refused(tmp_path: Path, change: int) -> None:
    path = write(tmp_path / "a.tokens")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    assert f"has {44 + change} bytes, but 6 tokens of 2 bytes make 44" in refused(path, 409)


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    message = refused(path, 410)
    assert "is damaged: its digest is" in message and "recorded is" in message


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_missing_or_malformed_sidecar_is_refused(tmp_path: Path, content: str | None) -> None:
    path = write(tmp_path / "a.tokens")
    sidecar = tmp_path / "a.tokens.json"
    sidecar.unlink()
    if content is not None:
        sidecar.write_text(content)
    assert f"{sidecar} cannot be read" in refused(path, 410)
