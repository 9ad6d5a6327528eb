"""The unit of parallel work of a build: consecutive units of the input, tokenized into files of their own."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.config.enums import SampleKind
from engine.config.schema_data import DataConfig
from engine.data.build.cache import file_digest, writable
from engine.data.build.census import Census
from engine.data.corpus.documents import read_unit, split_of, split_position
from engine.data.corpus.units import Document, Problem, Unit
from engine.data.storage.files import read_json, write_json
from engine.data.storage.indexed import IndexedFile, IndexedWriter
from engine.data.tokenizer.folder import encode_parts
from engine.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SMALLEST, _LARGEST = 4 << 20, 32 << 20
_SHARDS = 64
"""Shards that a corpus of moderate size is cut into, so that every core has some."""
RECORD = "shard.json"
"""What a shard holds; written last, so a shard without it is not finished."""
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True, slots=True)
class Shard:
    """A run of units. `size` in bytes of input."""

    number: int
    units: tuple[Unit, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(map(input_bytes, self.units))

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"shard-{self.number:05}"

    @property
    def identity(self) -> str:
        """Changes with what the shard is to hold; the rest is in the name of the entry."""
        return hashlib.blake2b(repr(self.units).encode(), digest_size=16).hexdigest()

    def files(self) -> str:
        """Its files, for messages."""
        names = list(dict.fromkeys(unit.path for unit in self.units))
        return ", ".join(names if len(names) <= 3 else [*names[:2], f"{len(names) - 3} more", names[-1]])


def input_bytes(unit: Unit) -> int:
    """Bytes of the unit that belong to the corpus."""
    return unit.size if unit.limit is None else min(unit.size, unit.limit)


def cut_shards(units: Sequence[Unit], shard_bytes: int | None = None) -> list[Shard]:
    """Runs of units of at least `shard_bytes` each but the last: a function of the units alone.

    None: a 64th of the corpus, at least 4 and at most 32 MiB.
    """
    if shard_bytes is None:
        shard_bytes = min(max(sum(map(input_bytes, units)) // _SHARDS, _SMALLEST), _LARGEST)
    found: list[Shard] = []
    run: list[Unit] = []
    size = 0
    for unit in units:
        run.append(unit)
        size += input_bytes(unit)
        if size >= shard_bytes:
            found.append(Shard(len(found), tuple(run)))
            run, size = [], 0
    return [*found, Shard(len(found), tuple(run))] if run else found


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every worker of a build needs to know: the options, a tokenizer folder, its vocabulary, where to write."""

    cfg: DataConfig
    tokenizer: Path
    vocab_size: int
    end: int
    folder: Path


def write_shard(job: Job, shard: Shard, folder: Path, tokenizer: Tokenizer, report: Callable[[int], None]) -> None:
    """Tokenize the units of `shard` into the new `folder`: files of each split that has documents, RECORD last.

    `report` gets numbers of bytes of input that add up to the shard's size.
    Raises DataError: what `read_unit` refuses, 439 the files cannot be written.
    """
    with writable(folder.parent):
        folder.mkdir()
    problems: list[Problem] = []
    census = Census()
    writers: dict[str, IndexedWriter] = {}
    labels: dict[str, list[float]] = {}
    integers = True
    with ExitStack() as stack:
        for batch in _batches(job.cfg, shard, problems, report):
            parts = iter(encode_parts(tokenizer, [part for document in batch for part in document.parts]))
            for document in batch:
                position = split_position(document)
                split = split_of(position, job.cfg)
                census.count(split, position, position)
                if split not in writers:
                    writers[split] = stack.enter_context(IndexedWriter(folder / split, job.vocab_size))
                ids = [next(parts) for _ in document.parts]
                if job.cfg.kind is not SampleKind.rows:
                    ids[-1].append(job.end)
                elif document.label is not None:
                    integers = isinstance(document.label, int)
                    labels.setdefault(split, []).append(document.label)
                writers[split].add_document(ids)
    record = {
        "identity": shard.identity,
        "digests": {split: writers[split].digest for split in writers},
        "census": census.to_json(),
        "label_type": ("class" if integers else "score") if labels else None,
        "problems": [[problem.path, problem.reason] for problem in problems],
    }
    with writable(folder.parent):
        for split, values in labels.items():
            np.save(labels_file(folder, split), np.array(values, dtype=np.float64))
        digests = {split: file_digest(labels_file(folder, split)) for split in labels}
        write_json(folder / RECORD, {**record, "labels": digests})


def labels_file(folder: Path, split: str) -> Path:
    """Labels of the documents of a split, float64."""
    return folder / f"{split}.labels.npy"


def _batches(
    cfg: DataConfig, shard: Shard, problems: list[Problem], report: Callable[[int], None]
) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = done = 0
    for unit in shard.units:
        left = input_bytes(unit)
        for document in read_unit(unit, cfg, problems):
            batch.append(document)
            size += document.size
            if size >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
                yield batch
                # Text is not what lies on disk (JSON, compression); the whole unit is right at its end.
                share = min(size, left)
                left -= share
                report(done + share)
                batch, size, done = [], 0, 0
        done += left
        if done >= _BATCH_BYTES:
            report(done)
            done = 0
    if batch:
        yield batch
    report(done)


def finished(folder: Path, shard: Shard) -> bool:
    """Whether `folder` holds all of `shard`, undamaged: sizes, sums and digests are compared."""
    try:
        record = read_json(folder / RECORD)
        if record["identity"] != shard.identity:
            return False
        for split, digest in record["digests"].items():
            file = IndexedFile.open(folder / split, "data.cache_dir")
            file.verify()
            if file.digest != digest:
                return False
        return all(file_digest(labels_file(folder, split)) == d for split, d in record["labels"].items())
    except (OSError, ValueError, KeyError, DataError):
        return False


def build_shard(job: Job, shard: Shard, tokenizer: Callable[[], Tokenizer], report: Callable[[int], None]) -> bool:
    """Finish `shard` in the folder of the job; True: an earlier build had. It is written under a name of its own.

    Raises as `write_shard`.
    """
    folder = job.folder / shard.name
    if finished(folder, shard):
        report(shard.size)
        return True
    shutil.rmtree(folder, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
    try:
        write_shard(job, shard, temporary, tokenizer(), report)
        rename_once(temporary, folder, folder / RECORD)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return False


def rename_once(temporary: Path, folder: Path, record: Path) -> None:
    """Give a finished folder its name; another process, which took this one for dead, may have done so before.

    A folder of that name without `record` is a half one, and is replaced. Raises OSError.
    """
    if not record.is_file():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not record.is_file():
            raise
