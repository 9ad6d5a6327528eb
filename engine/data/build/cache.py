"""The cache of prepared corpora: where an entry lies and when it can be trusted.

| in the folder of an entry | |
|---|---|
| `tokenizer/` | a Hugging Face tokenizer folder |
| `{train,valid,test}.{bin,idx,sums.json}` | tokens of each split that has documents (`engine.data.storage.indexed`) |
| `{split}.labels.npy` | `data.kind=rows`: float64, one label per document |
| `{split}.documents.npy` | of a Megatron prefix, instead of tokens: int64 numbers of its documents |
| `meta.json` | counts, digests, problems; written last |
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config.schema_data import DataConfig
from engine.data.corpus.documents import fingerprint
from engine.data.storage.files import read_json
from engine.data.storage.indexed import IndexedFile
from engine.data.storage.prefix import is_prefix, prefix_fingerprint
from engine.data.tokenizer.vocabulary import given_path
from engine.errors import DataError

FORMAT = 3
"""Raised whenever the meaning of an entry changes; older entries are then left alone and built anew."""
META = "meta.json"
TOKENIZER = "tokenizer"
TOKENIZER_META = "octant.json"
"""In the folder of a tokenizer of the cache: its digest; written last."""
SPLITS = ("train", "valid", "test")
RANDOM_SOURCE = "random"
_FIELDS = ("vocab_size", "fingerprint", "tokenizer", "kind", "splits", "prefix", "problems")
_TRAINED = ("bpe", "wordpiece")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken")


def cache_root(cfg: DataConfig) -> Path:
    """`data.cache_dir`, else `$XDG_CACHE_HOME/octant`, else `~/.cache/octant`. May not exist yet.

    Raises DataError 414: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if cfg.cache_dir:
            return Path(cfg.cache_dir).expanduser().absolute()
        return (Path(base) if base else Path.home() / ".cache") / "octant"
    except RuntimeError as error:
        rule = f"{str(error).rstrip('.')} of user {os.getuid()}, so the cache folder has no place"
        raise DataError.of(414, "data.cache_dir", cfg.cache_dir, rule, "Set data.cache_dir to a full path") from error


def weights(cfg: DataConfig) -> dict[str, float]:
    """Every source and its share of the samples; the shares add up to 1."""
    if not cfg.blend:
        return {cfg.source: 1.0}
    total = math.fsum(cfg.blend.values())
    return {source: weight / total for source, weight in cfg.blend.items()}


def trains_tokenizer(cfg: DataConfig) -> bool:
    """Whether the tokenizer is made from the corpus."""
    return cfg.tokenizer in _TRAINED


def source_fingerprint(cfg: DataConfig, source: str) -> str:
    """Changes when the source does; reads no content."""
    return prefix_fingerprint(source) if is_prefix(source) else fingerprint(cfg, source)


def tokenizer_folder(cfg: DataConfig) -> Path:
    """Where the tokenizer for `cfg` lies in the cache, named after all that it is made from.

    Raises DataError 447: a file of a given one cannot be read.
    """
    facts: list[object] = [FORMAT, cfg.vocab_size]
    if trains_tokenizer(cfg):
        facts += [cfg.tokenizer, _reading(cfg), [source_fingerprint(cfg, source) for source in weights(cfg)]]
    else:
        given = given_path(cfg.tokenizer)
        folder = given if os.path.isdir(given) else given.parent
        try:
            found = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
            # A file may have a name of its own.
            found |= {given} if os.path.isfile(given) else set()
            facts += [given.name, [(path.name, file_digest(path)) for path in sorted(found)]]
        except OSError as error:
            way_out = "Make it readable, or give another tokenizer"
            raise DataError.of(447, "data.tokenizer", cfg.tokenizer, f"it cannot be read ({error})", way_out) from error
    return cache_root(cfg) / f"tokenizer-{_key(facts)}"


def entry_folder(cfg: DataConfig, source: str, tokenizer_digest: str) -> Path:
    """Folder of the entry of one source, named after everything that shapes its content; sample length does not."""
    facts = [FORMAT, source_fingerprint(cfg, source), tokenizer_digest, _reading(cfg)]
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).name).strip("-")[:32] or "corpus"
    return cache_root(cfg) / f"{label}-{_key(facts)}"


def entries(cfg: DataConfig) -> list[tuple[Path, float]]:
    """Entry folder and share of the samples of each source, in the order of the options; none for `random`.

    Raises DataError: 412 nothing was prepared, 413 the tokenizer is damaged.
    """
    shares = weights(cfg)
    if RANDOM_SOURCE in shares:
        return []
    digest = tokenizer_digest(tokenizer_folder(cfg))
    return [(entry_folder(cfg, source, digest), share) for source, share in shares.items()]


def _reading(cfg: DataConfig) -> list[object]:
    """The options that shape documents and splits."""
    fields = [cfg.text_field, cfg.prompt_field, cfg.completion_field, cfg.pair_field, cfg.label_field]
    fractions = [float(cfg.valid_fraction), float(cfg.test_fraction)]
    return [str(cfg.kind), *fields, cfg.include, cfg.exclude, *fractions, cfg.max_bytes]


def _key(facts: list[object]) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether a builder finished `folder`: its meta file is written last."""
    return os.path.isfile(folder / META)


def file_digest(path: Path) -> str:
    """Hex BLAKE2b-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def folder_digest(folder: Path) -> str:
    """Hex BLAKE2b-256 of the names and contents of a tokenizer folder's files. Raises OSError."""
    facts = [(path.name, file_digest(path)) for path in sorted(folder.iterdir()) if path.name != TOKENIZER_META]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=32).hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Digest of a tokenizer of the cache. Raises DataError: 412 there is none, 413 it was changed."""
    if not os.path.isfile(folder / TOKENIZER_META):
        raise _absent(folder, "the tokenizer")
    try:
        recorded, found = read_json(folder / TOKENIZER_META)["digest"], folder_digest(folder)
    except (OSError, ValueError, KeyError) as error:
        raise damaged(folder, folder / TOKENIZER_META, f"cannot be read ({error!r})") from error
    if found != recorded:
        raise damaged(folder, folder, f"is damaged: its digest is {found[:12]}..., recorded is {recorded}")
    return found


def read_meta(folder: Path) -> dict[str, Any]:
    """What the builder recorded about the entry.

    `splits`: name -> documents, sequences, tokens, digest and files' digests; `tokenizer`, `fingerprint`: digests of
    content; `vocab_size`, `end`, `kind`, `label_type` ("class", "score" or None), `prefix` (of a Megatron prefix, else
    None), `problems` (path and reason of files left out).

    Raises DataError: 412 no finished entry, 413 the meta file is damaged.
    """
    if not is_complete(folder):
        raise _absent(folder, "the corpus")
    try:
        meta = read_json(folder / META)
        digest = meta.pop("digest")
        for field in _FIELDS:
            meta[field]
    except (OSError, ValueError, KeyError) as error:
        raise damaged(folder, folder / META, f"cannot be read ({error!r})") from error
    if (found := sealed(meta)["digest"]) != digest:
        raise damaged(folder, folder / META, f"is damaged: its digest is {found}, it records {digest}")
    return meta


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """What a meta file holds: `meta`, and the hex digest that `read_meta` compares."""
    content = json.dumps(meta, sort_keys=True).encode()
    return {**meta, "digest": hashlib.blake2b(content, digest_size=16).hexdigest()}


def verify_entry(folder: Path) -> dict[str, Any]:
    """Read every file of a finished entry (GB/s) and compare it with what the builder recorded; its meta data.

    Raises DataError: 412, 413, or 430 to 437 about token files; all name the file.
    """
    meta = read_meta(folder)
    try:
        found = folder_digest(folder / TOKENIZER)
    except OSError as error:
        raise damaged(folder, folder / TOKENIZER, f"cannot be read ({error.strerror})") from error
    if found != meta["tokenizer"]:
        recorded = f"{META} records {meta['tokenizer']}"
        raise damaged(folder, folder / TOKENIZER, f"is damaged: its digest is {found[:12]}..., {recorded}")
    for name, split in meta["splits"].items():
        for file, recorded in split["files"].items():
            try:
                found = file_digest(folder / file)
            except OSError as error:
                raise damaged(folder, folder / file, f"cannot be read ({error.strerror})") from error
            if found != recorded:
                rule = f"is damaged: its digest is {found[:12]}..., {META} records {recorded}"
                raise damaged(folder, folder / file, rule)
        if meta["prefix"] is None:
            IndexedFile.open(folder / name, "data.cache_dir").verify()
    if meta["prefix"] is not None:
        IndexedFile.open(Path(meta["prefix"])).verify(foreign=True)
    return meta


def _absent(folder: Path, what: str) -> Exception:
    return DataError.of(
        412,
        "data.cache_dir",
        folder.parent,
        f"it has no finished entry {folder.name}: {what} was not prepared, or its source changed since",
        "Start the run again, so that the corpus is prepared first",
    )


def damaged(folder: Path, path: Path, what: str) -> Exception:
    """DataError 413 about a file of an entry."""
    way_out = f"Delete the folder {folder}; the next run builds it again"
    return DataError.of(413, "data.cache_dir", folder, f"{path} {what}", way_out)


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Turn an OSError of the block into DataError 414 about the cache folder `root`."""
    try:
        yield
    except OSError as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise DataError.of(
            414,
            "data.cache_dir",
            root,
            f"the cache folder cannot be written ({reason})",
            "Set data.cache_dir (or XDG_CACHE_HOME) to a writable folder with free space",
        ) from error
