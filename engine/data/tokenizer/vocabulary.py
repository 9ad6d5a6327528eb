"""What the samples need to know of a tokenizer: its special tokens, and which ids are text and begin words."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ROLES = ("eos_token", "bos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
"""Keys of Hugging Face's tokenizer_config.json and special_tokens_map.json."""
FIM = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen, and ours
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder
    ("<PRE>", "<MID>", "<SUF>"),  # CodeLlama
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),
)
"""Usual names of the marks for fill-in-the-middle: prefix, middle, suffix."""
UNUSED_BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))
"""RFC 3629. A byte-level vocabulary spells each of them as the character of the same number."""
_FIRST_HIDDEN, _FIRST_HIDDEN_HIGH = 0x100, 0x122
"""GPT-2 spells visible bytes as themselves, 0x00 to 0x20 and 0x7f as U+0100 to U+0121, then hidden ones from 0x80."""
_BYTE_ENTRY = re.compile(r"<0x([0-9A-F]{2})>")
_PLACEHOLDER = re.compile(r"\[unused\d+\]")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's entries. `size`: ids are below it. `end` ends a document, and fills padding.

    `cls`, `sep`, `mask`: as in BERT; `fim`: marks of prefix, middle and suffix; None where the tokenizer has none.
    `text`, bool (size,): ids that text is made of. `word_start`, bool (size,): ids that begin a word; all that are not
    text do too, so a word never holds them.
    """

    size: int
    end: int
    cls: int | None
    sep: int | None
    mask: int | None
    fim: tuple[int, int, int] | None
    text: NDArray[np.bool_]
    word_start: NDArray[np.bool_]


def given_path(spec: str) -> Path:
    """The path of a given tokenizer; a `~` that names no home folder stays."""
    try:
        return Path(spec).expanduser()
    except RuntimeError:
        return Path(spec)


def vocabulary_of(folder: Path) -> Vocabulary:
    """The vocabulary of a tokenizer folder written by `make_tokenizer`. Raises DataError 406 when it is damaged."""
    try:
        content = json.loads((folder / TOKENIZER_JSON).read_text(encoding="utf-8"))
        roles = roles_of(folder)
        entries = entries_of(content)
        return _vocabulary(content, entries, roles)
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"the tokenizer in {folder} cannot be read ({error!r})"
        way_out = f"Delete the folder {folder.parent}; the next run builds it again"
        raise DataError.of(406, "data.cache_dir", folder.parent, rule, way_out) from error


def _vocabulary(content: dict[str, Any], entries: dict[str, int], roles: dict[str, str]) -> Vocabulary:
    size = max(entries.values()) + 1
    special = {entries[name] for name in (*special_tokens(content), *roles.values()) if name in entries}
    byte_level = is_byte_level(content)
    word_piece = content["model"].get("type") == "WordPiece"
    text, word_start = np.zeros(size, dtype=np.bool_), np.ones(size, dtype=np.bool_)
    for name, entry in entries.items():
        if entry in special or _is_unused(name, byte_level):
            continue
        text[entry] = True
        word_start[entry] = not name.startswith("##") if word_piece else _begins_word(name, byte_level)
    cls, sep, mask = (entries.get(roles.get(key, "")) for key in ("cls_token", "sep_token", "mask_token"))
    return Vocabulary(size, entries[roles["eos_token"]], cls, sep, mask, fim_of(entries), text, word_start)


def roles_of(folder: Path) -> dict[str, str]:
    """Special tokens by role, from the folder's special_tokens_map.json and tokenizer_config.json. Raises OSError,
    ValueError.
    """
    found: dict[str, str] = {}
    for path in (folder / "special_tokens_map.json", folder / TOKENIZER_CONFIG):
        if path.is_file():
            found |= roles_in(json.loads(path.read_text(encoding="utf-8")))
    return found


def roles_in(config: dict[str, Any]) -> dict[str, str]:
    """Special tokens by role. A token is a string, or an object with its `content`."""
    tokens = {key: config.get(key) for key in ROLES}
    values = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: value for key, value in values.items() if isinstance(value, str)}


def entries_of(content: dict[str, Any]) -> dict[str, int]:
    """Every entry of a tokenizer.json and its id. Unigram lists (piece, score), the other models map pieces to ids."""
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):
        vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
    return {**vocab, **{token["content"]: token["id"] for token in content.get("added_tokens", ())}}


def special_tokens(content: dict[str, Any]) -> list[str]:
    """Tokens of a tokenizer.json that no text is made of."""
    return [token["content"] for token in content.get("added_tokens", ()) if token["special"]]


def fim_of(entries: dict[str, int]) -> tuple[int, int, int] | None:
    """Ids of the marks for fill-in-the-middle under one of their usual names."""
    for prefix, middle, suffix in FIM:
        if prefix in entries and middle in entries and suffix in entries:
            return entries[prefix], entries[middle], entries[suffix]
    return None


def is_byte_level(content: dict[str, Any]) -> bool:
    """Whether entries are bytes in GPT-2's spelling."""
    return _has_type(content.get("decoder"), "ByteLevel") or _has_type(content.get("pre_tokenizer"), "ByteLevel")


def _has_type(part: object, name: str) -> bool:
    if isinstance(part, dict):
        return part.get("type") == name or any(_has_type(value, name) for value in part.values())
    return isinstance(part, list) and any(_has_type(value, name) for value in part)


def _is_unused(name: str, byte_level: bool) -> bool:
    if byte_level:
        return len(name) == 1 and ord(name) in UNUSED_BYTES
    match = _BYTE_ENTRY.fullmatch(name)
    return int(match[1], 16) in UNUSED_BYTES if match else _PLACEHOLDER.fullmatch(name) is not None


def _begins_word(name: str, byte_level: bool) -> bool:
    """Whether the entry starts with anything but a letter, a digit or an underscore: white space (`Ġ`, `Ċ`, `▁`) or
    punctuation. Bytes from 0x80 on continue a word, since most are of letters.
    """
    first = name[:1]
    if byte_level:
        if not first.isascii():
            return _FIRST_HIDDEN <= ord(first) < _FIRST_HIDDEN_HIGH
    elif match := _BYTE_ENTRY.fullmatch(name):
        first = chr(int(match[1], 16))
        if not first.isascii():
            return False
    return not (first.isalnum() or first == "_")
