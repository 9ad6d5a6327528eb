"""The cache of prepared corpora: where an entry lies, when it can be trusted, and who may build it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from engine.config.schema import DataConfig
from engine.data.corpus import corpus_fingerprint
from engine.data.tokens import TokenFile, read_json
from engine.errors import DataError

FORMAT = 1
"""Raised whenever the meaning of an entry changes; older entries are then left alone and built anew."""
META = "meta.json"
TOKENIZER = "tokenizer.json"
TRAIN = "train.tokens"
VALID = "valid.tokens"


def cache_root(cfg: DataConfig) -> Path:
    """`data.cache_dir`, else `$XDG_CACHE_HOME/octant`, else `~/.cache/octant`. May not exist yet."""
    if cfg.cache_dir is not None:
        return Path(cfg.cache_dir).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "octant"


def entry_folder(cfg: DataConfig) -> Path:
    """Folder of the entry for `cfg`, named after everything that shapes its content. Sample length and seed do not."""
    fingerprint = corpus_fingerprint(cfg.source, cfg.max_bytes)
    facts = [FORMAT, fingerprint, cfg.vocab_size, float(cfg.valid_fraction), cfg.max_bytes]
    key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(cfg.source).name).strip("-")[:32] or "corpus"
    return cache_root(cfg) / f"{label}-{cfg.vocab_size}-{key}"


def is_complete(folder: Path) -> bool:
    """Whether a builder finished `folder`: its meta file is written last."""
    return os.path.isfile(folder / META)


def file_digest(path: Path) -> str:
    """Hex BLAKE2b-256 of a whole small file."""
    return hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """What the builder recorded about the entry.

    Raises DataError: 412 no finished entry, 413 the meta file is damaged.
    """
    if not is_complete(folder):
        raise DataError.of(
            412,
            "data.cache_dir",
            folder.parent,
            f"it has no finished entry {folder.name}: the corpus was not prepared, or it changed since",
            "Start the run again, so that the corpus is prepared first",
        )
    try:
        meta = read_json(folder / META)
        return {key: meta[key] for key in ("vocab_size", "fingerprint", "tokenizer", "train", "valid")}
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, folder / META, f"cannot be read ({error!r})") from error


def verify_entry(folder: Path) -> None:
    """Read every file of a finished entry (about 1 GB/s) and compare it with the digests recorded by the builder.

    Raises DataError 407 to 410 for token files, 413 for the other files.
    """
    meta = read_meta(folder)
    try:
        tokenizer = file_digest(folder / TOKENIZER)
    except OSError as error:
        raise _damaged(folder, folder / TOKENIZER, f"cannot be read ({error.strerror})") from error
    found = {TOKENIZER: tokenizer, TRAIN: TokenFile.open(folder / TRAIN).verify()}
    recorded = {TOKENIZER: meta["tokenizer"], TRAIN: meta["train"]}
    if meta["valid"] is not None:
        found[VALID] = TokenFile.open(folder / VALID).verify()
        recorded[VALID] = meta["valid"]
    for name, digest in found.items():
        if digest != recorded[name]:
            rule = f"is damaged: its digest is {digest[:12]}..., {META} records {recorded[name]}"
            raise _damaged(folder, folder / name, rule)


def _damaged(folder: Path, path: Path, what: str) -> Exception:
    return DataError.of(
        413, "data.cache_dir", folder, f"{path} {what}", f"Delete the folder {folder}; the next run builds it again"
    )


@contextmanager
def builder_lock(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time build `folder`; the others wait here after one message.

    The lock belongs to an open file, so the kernel drops it when its holder dies. Its file, beside the folder, stays.
    Raises DataError 414 when the cache folder cannot be made or written.
    """
    with ExitStack() as stack:
        with writable(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder.with_name(f"{folder.name}.lock"), "ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"data: waiting for another process that builds {folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Turn an OSError of the block into DataError 414 about the cache folder `root`."""
    try:
        yield
    except OSError as error:
        raise DataError.of(
            414,
            "data.cache_dir",
            root,
            f"the cache folder cannot be written ({error})",
            "Set data.cache_dir (or XDG_CACHE_HOME) to a writable folder with free space",
        ) from error
