"""Checks of every file of the prepared corpora, read to the end: all damages, not the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from engine.config.schema_data import DataConfig
from engine.data.build.cache import (
    TOKENIZER,
    TOKENIZER_META,
    entry_folder,
    file_digest,
    folder_digest,
    read_meta,
    tokenizer_folder,
    weights,
)
from engine.data.storage.files import read_json
from engine.data.storage.indexed import IndexedFile
from engine.data.storage.layout import Names
from engine.data.storage.sums import BLOCK, Sums, each_block
from engine.data.tokenizer.vocabulary import vocabulary_of
from engine.errors import DataError


@dataclass(slots=True)
class Check:
    """One file or folder: bytes read, how long it took, and all that is wrong with it."""

    path: str
    size: int = 0
    seconds: float = 0.0
    damages: list[str] = field(default_factory=list)
    note: str = ""

    def line(self) -> str:
        """For a terminal."""
        rate = f"{self.size / max(self.seconds, 1e-9) / 1e9:.2f} GB/s"
        state = "DAMAGED" if self.damages else "ok"
        note = f" ({self.note})" if self.note else ""
        head = f"{state:8}{self.size / 1e6:>12,.3f} MB {rate:>12}  {self.path}{note}"
        return "\n".join([head, *(f"  {damage}" for damage in self.damages)])


def config_checks(cfg: DataConfig) -> Iterator[Check]:
    """All files that training with `cfg` reads. Raises DataError 412 when one of the entries was never built."""
    tokenizer = tokenizer_folder(cfg)
    if not (tokenizer / TOKENIZER_META).is_file():
        rule = f"it has no tokenizer {tokenizer.name}: the corpus was not prepared, or its source changed since"
        way_out = "Build it first: python -m engine.data build with the same words"
        raise DataError.of(412, "data.cache_dir", tokenizer.parent, rule, way_out)
    digest = ""

    def recorded() -> str:
        nonlocal digest
        digest = str(read_json(tokenizer / TOKENIZER_META)["digest"])
        return digest

    yield _folder_check(tokenizer, recorded, TOKENIZER_META)
    if not digest:
        return  # Entries are named after it.
    for source in weights(cfg):
        yield from entry_checks(entry_folder(cfg, source, digest))


def entry_checks(folder: Path) -> Iterator[Check]:
    """The files of one entry, and those of its Megatron prefix. Raises DataError 412 when it was never built."""
    try:
        meta = read_meta(folder)
    except DataError as error:
        if error.violations[0].code == 412:
            raise
        yield Check(str(folder / "meta.json"), damages=_rules(error))
        return
    tokenizer = _folder_check(folder / TOKENIZER, lambda: str(meta["tokenizer"]), "meta.json")
    size: int | None = None
    try:
        size = vocabulary_of(folder / TOKENIZER).size
        if size != meta["vocab_size"]:
            tokenizer.damages.append(f"has {size} entries, meta.json records {meta['vocab_size']}")
    except DataError as error:
        tokenizer.damages += _rules(error)
    yield tokenizer
    for name, split in meta["splits"].items():
        if meta["prefix"] is None:
            yield from prefix_checks(folder / name, "data.cache_dir", size, foreign=False, recorded=split)
        for file, digest in split["files"].items():
            yield _array_check(folder / file, digest, split["documents"])
    if meta["prefix"] is not None:
        yield from prefix_checks(Path(meta["prefix"]), "data.source", size, foreign=True)


def prefix_checks(
    prefix: Path, option: str, vocab_size: int | None, *, foreign: bool, recorded: dict[str, Any] | None = None
) -> Iterator[Check]:
    """PREFIX.idx and then PREFIX.bin. `recorded`: documents, sequences and tokens by the entry's meta file."""
    names = Names(prefix, option)
    index = Check(str(names.idx), _size(names.idx))
    started = time.monotonic()
    others: list[str] = []
    file = None
    try:
        file = IndexedFile.open(prefix, option)
        for what in ("documents", "sequences", "tokens") if recorded else ():
            count = getattr(file, f"num_{what}")
            if recorded is not None and count != recorded[what]:
                index.damages.append(f"has {count} {what}, meta.json records {recorded[what]}")
    except DataError as error:
        for rule in _rules(error):
            (index.damages if rule.startswith(str(names.idx)) else others).append(rule)
    index.seconds = time.monotonic() - started
    yield index
    content = _bin_check(names, file, vocab_size, foreign=foreign)
    content.damages = content.damages or others
    yield content


def _bin_check(names: Names, file: IndexedFile | None, vocab_size: int | None, *, foreign: bool) -> Check:
    check = Check(str(names.bin), _size(names.bin))
    sums = None
    try:
        sums = Sums.read(names.sums)
    except FileNotFoundError:
        if not foreign:
            check.damages.append(f"{names.sums} is missing, so damage cannot be found")
    except (OSError, ValueError) as error:
        check.damages.append(f"{names.sums} cannot be read ({error})")
    if file is None or vocab_size is None:
        check.note = "ids not compared with a vocabulary"
    if sums is None:
        check.note = "; ".join(filter(None, ["no checksums", check.note]))
    elif check.size != sums.bin_size:
        check.damages.append(f"has {check.size} bytes, {names.sums.name} records {sums.bin_size}")
    started = time.monotonic()
    dtype = None if file is None or vocab_size is None else file.dtype
    try:
        for number, (found, low, high) in enumerate(each_block(names.bin, check.size, lambda p: _fold(p, dtype))):
            first, last = number * BLOCK, min((number + 1) * BLOCK, check.size)
            if sums is not None and number < len(sums.bin_sums) and found != sums.bin_sums[number]:
                check.damages.append(f"bytes {first} to {last} have checksum {found}, not {sums.bin_sums[number]}")
            if vocab_size is not None and not 0 <= low <= high < vocab_size:
                rule = f"bytes {first} to {last} have the id {low if low < 0 else high}"
                check.damages.append(f"{rule}; legal are 0 to {vocab_size - 1}")
    except (OSError, EOFError) as error:
        check.damages.append(f"cannot be read ({error})")
    check.seconds = time.monotonic() - started
    return check


def _fold(pieces: Iterator[memoryview], dtype: np.dtype[Any] | None) -> tuple[str, int, int]:
    """Checksum of a block, and its lowest and highest id, at most and at least 0."""
    hasher, low, high = xxhash.xxh3_128(), 0, 0
    for piece in pieces:
        hasher.update(piece)
        if dtype is not None:
            ids = np.frombuffer(piece[: len(piece) // dtype.itemsize * dtype.itemsize], dtype)
            low, high = min(low, int(ids.min(initial=0))), max(high, int(ids.max(initial=0)))
    return hasher.hexdigest(), low, high


def _folder_check(folder: Path, recorded: Callable[[], str], record: str) -> Check:
    check = Check(str(folder))
    started = time.monotonic()
    try:
        check.size = sum(path.stat().st_size for path in folder.iterdir())
        found, wanted = folder_digest(folder), recorded()
        if found != wanted:
            check.damages.append(f"has the digest {found}, {record} records {wanted}")
    except (OSError, ValueError, KeyError) as error:
        check.damages.append(f"cannot be read ({error!r})")
    check.seconds = time.monotonic() - started
    return check


def _array_check(path: Path, recorded: str, documents: int) -> Check:
    """A file that meta.json has a digest of: sums, labels or document numbers."""
    check = Check(str(path), _size(path))
    started = time.monotonic()
    try:
        if (found := file_digest(path)) != recorded:
            check.damages.append(f"has the digest {found}, meta.json records {recorded}")
        elif path.suffix == ".npy" and len(array := np.load(path)) != documents:
            check.damages.append(f"has {len(array)} entries for {documents} documents")
    except (OSError, ValueError) as error:
        check.damages.append(f"cannot be read ({error})")
    check.seconds = time.monotonic() - started
    return check


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _rules(error: Exception) -> list[str]:
    return [violation.rule for violation in error.violations] if isinstance(error, DataError) else [str(error)]
