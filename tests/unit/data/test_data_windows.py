"""Streams and windows of text: which tokens they hold, in which documents, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.data.samples.stream import Stream
from engine.data.samples.windows import Cut, DocumentWindows, RandomTokens, RandomWindows, StreamWindows, Windows
from engine.errors import DataError
from tests.unit.data.data_options import stream

NEXT = Cut(seq_len=3, width=4, stride=3, shortest=2)
SLIDING = Cut(seq_len=4, width=5, stride=2, shortest=2, context=2)
PAIR = Cut(seq_len=6, width=3, stride=3, shortest=2)
SINGLE = Cut(seq_len=5, width=3, stride=3, shortest=1)
# Documents of 4, 1, 0, 2 and (without an end) 5 tokens.
DOCUMENTS = [[[1, 2], [3, 4, 0]], [[5, 0]], [[0]], [[6, 7, 0]], [[11, 12, 13, 14, 15]]]


def all_of(found: Windows) -> list[list[int]]:
    text = found.read(np.arange(found.num_windows))
    return [row[:length].tolist() for row, length in zip(text.tokens, text.lengths, strict=True)]


def contexts(found: Windows) -> list[int]:
    result: list[int] = found.read(np.arange(found.num_windows)).context.tolist()
    return result


def borders(found: Windows) -> list[list[int]]:
    starts = found.read(np.arange(found.num_windows)).starts
    assert starts is not None
    return [np.flatnonzero(row).tolist() for row in starts]


def test_windows_of_a_stream_share_the_last_label_only(tmp_path: Path) -> None:
    text = stream(tmp_path, [[[1, 2, 3, 4, 0]], [[5, 6, 7, 0]]])
    assert all_of(StreamWindows(text, NEXT)) == [[1, 2, 3, 4], [4, 0, 5, 6]]
    assert all_of(StreamWindows(text, PAIR)) == [[1, 2, 3], [4, 0, 5], [6, 7, 0]]
    sliding = StreamWindows(text, SLIDING)
    assert all_of(sliding) == [[1, 2, 3, 4, 0], [3, 4, 0, 5, 6], [0, 5, 6, 7, 0]]
    assert contexts(sliding) == [0, 2, 2]


def test_windows_tell_where_documents_begin(tmp_path: Path) -> None:
    text = stream(tmp_path, DOCUMENTS)
    assert text.starts.tolist() == [0, 5, 7, 8, 11, 16]
    found = StreamWindows(text, NEXT, borders=True)
    assert all_of(found) == [[1, 2, 3, 4], [4, 0, 5, 0], [0, 0, 6, 7], [7, 0, 11, 12], [12, 13, 14, 15]]
    # A window that starts with a document has no border there: its row begins anyway.
    assert borders(found) == [[], [2], [1, 2], [2], []]
    assert StreamWindows(text, NEXT).read(np.array([0])).starts is None


def test_windows_of_documents_end_with_them(tmp_path: Path) -> None:
    text = stream(tmp_path, DOCUMENTS)
    labelled = DocumentWindows(text, NEXT)
    assert all_of(labelled) == [[1, 2, 3, 4], [4, 0], [5, 0], [6, 7, 0], [11, 12, 13, 14], [14, 15]]
    ends = text.ended(0)
    assert ends.tolist() == [1, 1, 1, 1, 0]
    pairs = DocumentWindows(text, PAIR, without_end=ends)
    assert all_of(pairs) == [[1, 2, 3], [6, 7], [11, 12, 13], [14, 15]]
    single = DocumentWindows(text, SINGLE, without_end=ends)
    assert all_of(single) == [[1, 2, 3], [4], [5], [6, 7], [11, 12, 13], [14, 15]]


def test_windows_of_documents_slide_within_them(tmp_path: Path) -> None:
    text = stream(tmp_path, [[[1, 2, 3, 4, 5, 6, 0]], [[7, 0]], [[8, 9, 8, 9, 0]]])
    found = DocumentWindows(text, SLIDING)
    assert all_of(found) == [[1, 2, 3, 4, 5], [3, 4, 5, 6, 0], [7, 0], [8, 9, 8, 9, 0]]
    assert contexts(found) == [0, 2, 0, 0]


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [4, 0], [1, 3, 3], [2, 4]])
def test_chosen_documents_are_read_as_if_they_lay_side_by_side(tmp_path: Path, numbers: list[int]) -> None:
    flat = [[token for sequence in DOCUMENTS[n] for token in sequence] for n in numbers]
    chosen = stream(tmp_path, DOCUMENTS, numbers)
    (tmp_path / "copy").mkdir()
    copied = stream(tmp_path / "copy", [[document] for document in flat])
    assert chosen.num_tokens == copied.num_tokens == sum(map(len, flat))
    assert chosen.starts.tolist() == copied.starts.tolist()
    assert chosen.parts.tolist() == [len(DOCUMENTS[n]) for n in numbers]
    assert chosen.first_parts.tolist() == [len(DOCUMENTS[n][0]) for n in numbers]
    for cut in (NEXT, SLIDING, PAIR):
        pair = [StreamWindows(text, cut, borders=True) for text in (chosen, copied)]
        assert all_of(pair[0]) == all_of(pair[1]) and borders(pair[0]) == borders(pair[1])
        documents = [DocumentWindows(text, cut) for text in (chosen, copied)]
        assert all_of(documents[0]) == all_of(documents[1])


def test_stream_shorter_than_a_sample_is_refused_with_the_nearest_length(tmp_path: Path) -> None:
    text = stream(tmp_path, [[list(range(10))]])
    for seq_len, extra, needs, legal in ((10, 1, "+ 1 = 11", 9), (0, 1, "+ 1 = 1", 1), (14, -3, "- 3 = 11", 13)):
        cut = Cut(seq_len=seq_len, width=seq_len + extra, stride=1, shortest=2)
        with pytest.raises(DataError) as caught:
            StreamWindows(text, cut)
        message = str(caught.value)
        assert f"[OCT411] data.seq_len={seq_len}" in message
        assert f"needs data.seq_len {needs} tokens (at least 2)" in message and "has 10" in message
        assert f"Nearest legal: data.seq_len={legal}" in message
        assert StreamWindows(text, Cut(seq_len=legal, width=legal + extra, stride=1, shortest=2)).num_windows >= 1


def test_text_that_no_length_fits_is_refused_without_a_length(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        StreamWindows(stream(tmp_path, [[[7]]]), Cut(seq_len=4, width=5, stride=4, shortest=2))
    assert "has 1" in str(caught.value) and str(caught.value).endswith("Give a larger corpus")


def test_documents_that_are_all_too_short_are_refused(tmp_path: Path) -> None:
    text = stream(tmp_path, [[[1, 0]], [[2, 0]], [[0]]])
    assert DocumentWindows(text, SINGLE, without_end=1).num_windows == 2
    with pytest.raises(DataError) as caught:
        DocumentWindows(text, PAIR, without_end=1)
    message = str(caught.value)
    assert "[OCT418] data.variable_length=True" in message
    assert f"no document of {text.path} has the 2 tokens that a sample needs" in message
    assert "Use data.variable_length=false" in message


def test_random_documents_are_four_in_a_window_and_their_ends_are_like_other_tokens() -> None:
    cut = Cut(seq_len=64, width=65, stride=64, shortest=2)
    tokens = RandomTokens(first=1, vocab_size=50, documents=True)
    text = RandomWindows(0, 0, cut, tokens, variable_length=False).read(np.arange(500))
    assert text.starts is not None and not text.starts[:, 0].any()
    # 32000 draws of one in 16, and 49 kinds of ends, within five standard deviations (p < 1e-4 together).
    count = int(text.starts.sum())
    assert abs(count - 32000 / 16) < 5 * np.sqrt(32000 * 15) / 16
    ends = np.bincount(text.tokens[:, :-1][text.starts[:, 1:]], minlength=50)
    assert ends[0] == 0 and np.abs(ends[1:] - count / 49).max() < 5 * np.sqrt(count / 49)


def test_random_documents_begin_inside_their_row() -> None:
    cut = Cut(seq_len=16, width=17, stride=16, shortest=2)
    text = RandomWindows(0, 0, cut, RandomTokens(first=1, vocab_size=50, documents=True), variable_length=True).read(
        np.arange(200)
    )
    assert text.starts is not None and text.starts.sum() > 100
    assert not text.starts[np.arange(17) >= text.lengths[:, None]].any()


def test_an_unread_stream_costs_no_lists(tmp_path: Path) -> None:
    text = stream(tmp_path, DOCUMENTS)
    StreamWindows(text, NEXT).read(np.array([0]))
    assert isinstance(text, Stream) and "starts" not in vars(text) and "_pieces" not in vars(text)
