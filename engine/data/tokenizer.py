"""Byte-level BPE (Sennrich et al., arXiv 1508.07909, on bytes as in GPT-2), trained on the corpus itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.errors import DataError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MIN_VOCAB_SIZE = 257
"""256 bytes and the end-of-text token: any text can be encoded, so there is no unknown token."""
UNUSED_BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))
"""RFC 3629. A byte-level vocabulary spells each of them as the character of the same number."""
_PIECE_CHARS = 1 << 18


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of at most `vocab_size` entries; `<|endoftext|>` is entry 0, the 256 bytes follow.

    Deterministic: equal texts in equal order give an equal tokenizer. When the texts have too few distinct words for
    `vocab_size` entries the tokenizer is smaller; `get_vocab_size()` tells the actual size.

    Raises DataError 405 when `vocab_size` is below 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError.of(
            405,
            "data.vocab_size",
            vocab_size,
            f"a byte-level tokenizer needs 256 bytes + 1 end-of-text token = {MIN_VOCAB_SIZE} entries",
            f"Nearest legal: data.vocab_size={MIN_VOCAB_SIZE}",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer=trainer)
    return _plain_text_only(tokenizer)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `path` (JSON of the `tokenizers` library) by way of a temporary file and a rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(tokenizer.to_str(), encoding="utf-8")
    os.replace(temporary, path)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer written by `save_tokenizer`.

    Raises DataError 406 when the file is missing or is not such a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for every kind of malformed file
        raise _damaged(path, f"cannot be read as a tokenizer ({error})") from error
    if tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise _damaged(path, f"does not have {END_OF_TEXT} as entry {END_OF_TEXT_ID}")
    return _plain_text_only(tokenizer)


def unused_entries(tokenizer: Tokenizer) -> list[int]:
    """Entries that occur in no text: those of the bytes that UTF-8 never uses. The same in all our tokenizers."""
    entries: dict[str, int] = tokenizer.get_vocab()
    return [entries[chr(byte)] for byte in UNUSED_BYTES]


def _damaged(path: Path, what: str) -> Exception:
    return DataError.of(
        406,
        "data.cache_dir",
        path.parent,
        f"{path} {what}",
        f"Delete the folder {path.parent}; the next run builds it again",
    )


def _plain_text_only(tokenizer: Tokenizer) -> Tokenizer:
    """Encode `<|endoftext|>` inside a document as ordinary characters: only the writer separates documents."""
    tokenizer.encode_special_tokens = True
    return tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document; `ends_document` marks the last one."""

    text: str
    ends_document: bool


def pieces(text: str) -> Iterator[Piece]:
    """Cut a document into pieces of at most 262144 characters, after a line where possible.

    Keeps the memory of `encode` bounded and its threads busy. The pieces' texts join to `text` again.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        newline = text.rfind("\n", start, start + _PIECE_CHARS)
        end = start + _PIECE_CHARS if newline < 0 else newline + 1
        yield Piece(text[start:end], ends_document=False)
        start = end
    yield Piece(text[start:], ends_document=True)


def encode(tokenizer: Tokenizer, batch: Sequence[Piece]) -> Iterator[list[int]]:
    """Token ids of each piece, encoded in parallel; one `<|endoftext|>` follows the last piece of a document."""
    encoded = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
    for encoding, piece in zip(encoded, batch, strict=True):
        yield [*encoding.ids, END_OF_TEXT_ID] if piece.ends_document else encoding.ids
