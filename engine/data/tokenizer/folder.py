"""Tokenizers of a cache entry: made once, from the corpus or from a given one, then loaded to encode documents."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from engine.data.tokenizer.given import given_tokenizer
from engine.data.tokenizer.train import TRAINERS
from engine.data.tokenizer.vocabulary import ROLES, TOKENIZER_CONFIG, TOKENIZER_JSON, roles_of
from engine.errors import DataError

_PIECE_CHARS = 1 << 18
_BATCH_CHARS = 1 << 22
_SAFE_CUT = re.compile(r"\S\n(?=\S)")
"""After a line of text, before a line that is not indented: no word of a byte-level tokenizer goes across."""
_SPACE = re.compile(r"\s")


def make_tokenizer(spec: str, vocab_size: int, texts: Callable[[], Iterator[str]], folder: Path) -> None:
    """Write the tokenizer `spec` (data.tokenizer) to the new `folder`, for `tokenizers` and for transformers.

    `bpe` and `wordpiece` are trained on `texts`, which may be asked for more than once, and have at most `vocab_size`
    entries, fewer when the texts have too few words. Equal texts in equal order give equal files. Anything else is the
    path of a given tokenizer, whose ids are kept. The folder holds all that the tokenizer needs.

    Raises DataError: 405 `vocab_size` is too small to train, 441 a given tokenizer has more entries than `vocab_size`,
    446 there is no tokenizer at `spec`, 447 it cannot be read, 448 it has no token to end a document, 449 text could
    spell one of its special tokens.
    """
    if spec in TRAINERS:
        tokenizer, config = TRAINERS[spec](vocab_size, texts)
    else:
        tokenizer, config = given_tokenizer(spec, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_JSON).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write(folder / TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    roles = {key: config[key] for key in ROLES if key in config}
    _write(folder / "special_tokens_map.json", roles)


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder written by `make_tokenizer`. It encodes special tokens inside a text as ordinary
    characters, so that only the engine separates documents.

    Raises DataError 406 when a file is missing or damaged.
    """
    try:
        tokenizer = Tokenizer.from_str((folder / TOKENIZER_JSON).read_text(encoding="utf-8"))
        known = tokenizer.token_to_id(roles_of(folder).get("eos_token", ""))
    except Exception as error:  # the library raises bare Exception for every kind of malformed file
        raise _damaged(folder, f"cannot be read ({error})") from error
    if known is None:
        raise _damaged(folder, f"has no entry for the eos_token of {TOKENIZER_CONFIG}")
    tokenizer.encode_special_tokens = True
    return tokenizer


def _damaged(folder: Path, what: str) -> Exception:
    rule = f"the tokenizer {folder / TOKENIZER_JSON} {what}"
    way_out = f"Delete the folder {folder.parent}; the next run builds it again"
    return DataError.of(406, "data.cache_dir", folder.parent, rule, way_out)


def encode_parts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens. About 4 million characters are in work at a time.

    Texts of more than 262144 characters are cut where no word is, so that the ids are those of the whole text. Only a
    text without such a place may be cut inside a word. SentencePiece's kinds, which know no words, are not cut.
    """
    encoded: list[list[int]] = [[] for _ in texts]
    cut = _cut_of(tokenizer)
    batch: list[str] = []
    owners: list[int] = []
    chars = 0

    def flush() -> None:
        for owner, encoding in zip(owners, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            encoded[owner] += encoding.ids
        batch.clear()
        owners.clear()

    for number, text in enumerate(texts):
        for piece in pieces(text, cut):
            batch.append(piece)
            owners.append(number)
            chars += len(piece)
            if chars >= _BATCH_CHARS:
                flush()
                chars = 0
    flush()
    return encoded


def _cut_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What matches just before a place where a text may be cut; None: nowhere."""
    if isinstance(tokenizer.model, models.WordPiece):
        return _SPACE
    # A tokenizer that puts a space before each text would put one before each piece.
    adds_space = getattr(tokenizer.pre_tokenizer, "add_prefix_space", False)
    return _SAFE_CUT if isinstance(tokenizer.decoder, decoders.ByteLevel) and not adds_space else None


def pieces(text: str, cut: re.Pattern[str] | None) -> Iterator[str]:
    """`text` in pieces of at most 262144 characters, each cut after the last match of `cut` where there is one."""
    start = 0
    while cut is not None and len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        for begin in (end - _PIECE_CHARS // 64, start):
            matches = list(cut.finditer(text, begin, end))
            if matches:
                end = matches[-1].end()
                break
        yield text[start:end]
        start = end
    yield text[start:]
