"""The byte-level tokenizer: determinism, lossless encoding, document ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    MIN_VOCAB_SIZE,
    Piece,
    encode,
    load_tokenizer,
    pieces,
    save_tokenizer,
    train_tokenizer,
)
from engine.errors import DataError

TEXTS = ["def add(a, b):\n    return a + b\n", "for word in words:\n    print(word)\n", "été, naïve, 你好 🙂\n"] * 3


def test_training_is_deterministic_and_ids_start_with_end_of_text() -> None:
    first = train_tokenizer(iter(TEXTS), 300)
    assert first.to_str() == train_tokenizer(iter(TEXTS), 300).to_str()
    assert first.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID == 0
    assert first.get_vocab_size() == 300


def test_small_corpus_gives_a_smaller_tokenizer() -> None:
    assert MIN_VOCAB_SIZE <= train_tokenizer(["ab ab ab"], 5000).get_vocab_size() < 300


def test_any_text_round_trips_also_after_loading(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for text in ["never seen\t\r\n  ", "ελληνικά 🙂", *TEXTS]:
        (ids,) = encode(tokenizer, [Piece(text, ends_document=False)])
        assert tokenizer.decode(ids) == text
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_only_the_end_of_a_document_gets_the_end_of_text_token(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = f"a {END_OF_TEXT} b"
    middle, last = encode(tokenizer, [Piece(text, ends_document=False), Piece(text, ends_document=True)])
    assert END_OF_TEXT_ID not in middle
    assert last == [*middle, END_OF_TEXT_ID]


@pytest.mark.parametrize("text", ["", "short", "x" * 600_000, "line of text\n" * 50_000])
def test_pieces_join_to_the_document_and_only_the_last_one_ends_it(text: str) -> None:
    parts = list(pieces(text))
    assert "".join(part.text for part in parts) == text
    assert [part.ends_document for part in parts] == [False] * (len(parts) - 1) + [True]
    assert max(len(part.text) for part in parts) <= 262_144
    if "\n" in text:
        assert len(parts) > 1 and all(part.text.endswith("\n") for part in parts[:-1])


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        train_tokenizer(TEXTS, 256)
    message = str(caught.value)
    assert "[OCT405] data.vocab_size=256" in message
    assert "256 bytes + 1 end-of-text token = 257 entries" in message
    assert "Nearest legal: data.vocab_size=257" in message


def test_missing_malformed_and_foreign_tokenizers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    foreign = train_tokenizer(TEXTS, 300).to_str().replace(END_OF_TEXT, "<|other|>")
    for content, words in ((None, "cannot be read"), ("{", "cannot be read"), (foreign, "as entry 0")):
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError) as caught:
            load_tokenizer(path)
        message = str(caught.value)
        assert f"[OCT406] data.cache_dir={tmp_path}" in message
        assert str(path) in message and words in message
        assert f"Delete the folder {tmp_path}" in message
