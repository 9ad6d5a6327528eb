"""Windows of text: which tokens they hold, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.data import windows
from engine.data.tokens import TokenFile, TokenWriter
from engine.data.windows import Cut, DocumentWindows, FileWindows
from engine.errors import DataError

NEXT = Cut(seq_len=3, specials=0, overlap=1, shortest=2)
PAIR = Cut(seq_len=6, specials=3, overlap=0, shortest=2)
SINGLE = Cut(seq_len=5, specials=2, overlap=0, shortest=1)


def file(path: Path, ids: list[int]) -> TokenFile:
    with TokenWriter(path / "a.tokens", 300) as writer:
        writer.append(ids)
    return TokenFile.open(path / "a.tokens")


def all_of(found: FileWindows | DocumentWindows) -> list[list[int]]:
    return [found.window(i).tolist() for i in range(found.num_windows)]


def test_windows_of_a_file_overlap_by_the_last_label_only(tmp_path: Path) -> None:
    tokens = file(tmp_path, [1, 2, 3, 4, 0, 5, 6, 7, 0])
    assert all_of(FileWindows(tokens, NEXT)) == [[1, 2, 3, 4], [4, 0, 5, 6]]
    assert all_of(FileWindows(tokens, PAIR)) == [[1, 2, 3], [4, 0, 5], [6, 7, 0]]


def test_windows_of_documents_end_with_them(tmp_path: Path) -> None:
    # Documents of 4, 1, 0, 2 and (without an end) 5 tokens.
    tokens = file(tmp_path, [1, 2, 3, 4, 0, 5, 0, 0, 6, 7, 0, 11, 12, 13, 14, 15])
    labelled = DocumentWindows(tokens, NEXT, with_end=True)
    assert all_of(labelled) == [[1, 2, 3, 4], [4, 0], [5, 0], [6, 7, 0], [11, 12, 13, 14], [14, 15]]
    pairs = DocumentWindows(tokens, PAIR, with_end=False)
    assert all_of(pairs) == [[1, 2, 3], [6, 7], [11, 12, 13], [14, 15]]
    single = DocumentWindows(tokens, SINGLE, with_end=False)
    assert all_of(single) == [[1, 2, 3], [4], [5], [6, 7], [11, 12, 13], [14, 15]]


def test_documents_across_the_blocks_of_the_scan_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = file(tmp_path, [1, 2, 3, 4, 0, 5, 6, 0])
    whole = all_of(DocumentWindows(tokens, NEXT, with_end=True))
    for block in (1, 3, 4, 5):
        monkeypatch.setattr(windows, "_SCAN_TOKENS", block)
        assert all_of(DocumentWindows(tokens, NEXT, with_end=True)) == whole == [[1, 2, 3, 4], [4, 0], [5, 6, 0]]


def test_file_shorter_than_a_sample_is_refused_with_the_nearest_length(tmp_path: Path) -> None:
    tokens = file(tmp_path, list(range(10)))
    for seq_len, specials, overlap, needs, legal in (
        (10, 0, 1, "+ 1 = 11", 9),
        (0, 0, 1, "+ 1 = 1", 1),
        (14, 3, 0, "- 3 = 11", 13),
    ):
        cut = Cut(seq_len=seq_len, specials=specials, overlap=overlap, shortest=2)
        with pytest.raises(DataError) as caught:
            FileWindows(tokens, cut)
        message = str(caught.value)
        assert f"[OCT411] data.seq_len={seq_len}" in message
        assert f"needs data.seq_len {needs} tokens (at least 2)" in message and "has 10" in message
        assert f"Nearest legal: data.seq_len={legal}" in message
        nearest = Cut(seq_len=legal, specials=specials, overlap=overlap, shortest=2)
        assert FileWindows(tokens, nearest).num_windows >= 1


def test_documents_that_are_all_too_short_are_refused(tmp_path: Path) -> None:
    tokens = file(tmp_path, [1, 0, 2, 0, 0])
    assert DocumentWindows(tokens, SINGLE, with_end=False).num_windows == 2
    with pytest.raises(DataError) as caught:
        DocumentWindows(tokens, PAIR, with_end=False)
    message = str(caught.value)
    assert "[OCT418] data.variable_length=True" in message
    assert f"no document of {tokens.path} has the 2 tokens that a sample needs" in message
    assert "Use data.variable_length=false" in message
