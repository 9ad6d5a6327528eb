"""From a corpus to a cache entry: two passes over the documents, the first for the tokenizer, the second for tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from engine.config.schema import DataConfig
from engine.data.cache import (
    FORMAT,
    META,
    TOKENIZER,
    TRAIN,
    VALID,
    builder_lock,
    cache_root,
    entry_folder,
    file_digest,
    is_complete,
    verify_entry,
    writable,
)
from engine.data.corpus import corpus_bytes, documents, is_validation, split_position
from engine.data.tokenizer import Piece, encode, pieces, save_tokenizer, train_tokenizer
from engine.data.tokens import TokenWriter, write_json
from engine.errors import DataError

RANDOM_SOURCE = "random"
TOKENIZER_SAMPLE_BYTES = 16_000_000
"""The tokenizer is trained on about this many bytes, spread evenly over the training documents."""
_BLOCK_CHARS = 16_384
_BATCH_CHARS = 4_000_000


def prepare(cfg: DataConfig, say: Callable[[str], None]) -> Path:
    """Make sure that the cache holds the tokenizer and the token files for `cfg`, and return the entry's folder.

    `say` gets lines about the progress. Any number of processes may call this at once, on one machine or on a shared
    file system: one builds, the others wait and use its result. A builder that dies leaves nothing that is trusted.
    A finished entry is compared with its digests; nothing is written then, so the cache may be read-only.
    For the source `random` there is nothing to build; the result is the cache root, which may not exist.

    Raises DataError: 401 to 404 the corpus, 405 data.vocab_size, 407 to 413 a damaged entry, 414 the cache folder
    cannot be written, 415 the validation split is empty, 416 the training split is empty.
    """
    if cfg.source == RANDOM_SOURCE:
        return cache_root(cfg)
    folder = entry_folder(cfg)
    if not is_complete(folder):
        with builder_lock(folder, say):
            if not is_complete(folder):
                with writable(folder.parent):
                    _build(cfg, folder, say)
                return folder
    verify_entry(folder)
    say(f"data: using {folder}")
    return folder


def _build(cfg: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    started = time.monotonic()
    total = corpus_bytes(cfg.source, cfg.max_bytes)
    say(f"data: building {folder} from {cfg.source} ({total / 1e6:.1f} MB)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    census = Census()
    texts = _training_texts(cfg, census, Progress(say, "tokenizer", total), TOKENIZER_SAMPLE_BYTES / max(total, 1))
    tokenizer = train_tokenizer(texts, cfg.vocab_size)
    census.check(cfg.valid_fraction)
    save_tokenizer(tokenizer, folder / TOKENIZER)
    with ExitStack() as stack:
        vocab_size = tokenizer.get_vocab_size()
        train = stack.enter_context(TokenWriter(folder / TRAIN, vocab_size))
        valid = stack.enter_context(TokenWriter(folder / VALID, vocab_size)) if census.valid else None
        _write_tokens(cfg, tokenizer, train, valid, Progress(say, "tokens", total))
    digests = [file_digest(folder / TOKENIZER), train.digest, valid.digest if valid else None]
    meta = {
        "format": FORMAT,
        "source": cfg.source,
        "valid_fraction": cfg.valid_fraction,
        "max_bytes": cfg.max_bytes,
        "vocab_size": vocab_size,
        "train_documents": census.train,
        "train_tokens": train.count,
        "valid_documents": census.valid,
        "valid_tokens": valid.count if valid else 0,
        "fingerprint": hashlib.blake2b(json.dumps(digests).encode(), digest_size=16).hexdigest(),
        **dict(zip(("tokenizer", "train", "valid"), digests, strict=True)),
    }
    write_json(folder / META, meta)
    say(
        f"data: {train.count} training and {meta['valid_tokens']} validation tokens, vocabulary {vocab_size}, "
        f"{time.monotonic() - started:.1f} s"
    )


@dataclass(slots=True)
class Census:
    """Documents on each side of the split, and the range of their split positions."""

    train: int = 0
    valid: int = 0
    lowest: float = 1.0
    highest: float = 0.0

    def count(self, position: float, held_out: bool) -> None:
        """Count one document."""
        self.valid += held_out
        self.train += not held_out
        self.lowest = min(self.lowest, position)
        self.highest = max(self.highest, position)

    def check(self, fraction: float) -> None:
        """Raise DataError 415 or 416 when a split that was asked for got no document."""
        if fraction == 0 or (self.train and self.valid):
            return
        empty, full = ("validation", "training") if self.train else ("training", "validation")
        bound = self.lowest + 1e-6 if self.train else self.highest - 1e-6
        way_out = "Nearest legal: data.valid_fraction=0 (no validation)"
        if self.lowest < self.highest:
            way_out = f"Nearest legal: data.valid_fraction={bound:.6f}; 0 means no validation"
        raise DataError.of(
            415 if self.train else 416,
            "data.valid_fraction",
            fraction,
            f"the content hash puts all {self.train + self.valid} documents into the {full} split, "
            f"the {empty} split is empty",
            way_out,
        )


class Progress:
    """Says how far a pass is, at most every tenth of the corpus and every megabyte."""

    def __init__(self, say: Callable[[str], None], label: str, total: int) -> None:
        self._say = say
        self._label = label
        self._total = total
        self._interval = max(total / 10, 1e6)
        self._done = 0
        self._next = self._interval

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        self._done += count
        if self._done >= self._next:
            self._next = self._done + self._interval
            self._say(f"data: {self._label}, {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB")


def _training_texts(cfg: DataConfig, census: Census, progress: Progress, rate: float) -> Iterator[str]:
    """Blocks of training documents for the tokenizer: a share `rate` of all blocks at even distances."""
    due = 0.0
    for document in documents(cfg.source, cfg.max_bytes):
        progress.add(len(document.text.encode()))
        held_out = is_validation(document, cfg.valid_fraction)
        census.count(split_position(document), held_out)
        if held_out:
            continue
        for start in range(0, len(document.text), _BLOCK_CHARS):
            block = document.text[start : start + _BLOCK_CHARS]
            due += len(block) * min(rate, 1.0)
            if due >= len(block):
                due -= len(block)
                yield block


def _write_tokens(
    cfg: DataConfig, tokenizer: Tokenizer, train: TokenWriter, valid: TokenWriter | None, progress: Progress
) -> None:
    batch: list[Piece] = []
    targets: list[TokenWriter] = []
    chars = 0

    def flush() -> None:
        for target, ids in zip(targets, encode(tokenizer, batch), strict=True):
            target.append(ids)
        progress.add(sum(len(piece.text.encode()) for piece in batch))
        batch.clear()
        targets.clear()

    for document in documents(cfg.source, cfg.max_bytes):
        target = valid if valid is not None and is_validation(document, cfg.valid_fraction) else train
        for piece in pieces(document.text):
            batch.append(piece)
            targets.append(target)
            chars += len(piece.text)
            if chars >= _BATCH_CHARS:
                flush()
                chars = 0
    flush()
