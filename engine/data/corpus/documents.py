"""Corpora: units of work that any process can read alone, and which split a document belongs to.

`units` lists what a source is made of, `read_unit` reads one piece. The documents of all units in their order are the
corpus, however many processes read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from engine.config.enums import BadFiles, SampleKind
from engine.config.schema_data import DataConfig
from engine.data.corpus.columnar import row_groups
from engine.data.corpus.content import chunks, is_compressed
from engine.data.corpus.listing import PYTHON_SOURCE, TABLE_SUFFIXES, SourceFile, plain_suffix, source_files
from engine.data.corpus.readers import READERS
from engine.data.corpus.records import fields, has_field
from engine.data.corpus.units import BadInputError, Document, Format, Problem, Unit, option_of
from engine.data.storage.prefix import is_prefix
from engine.errors import DataError

__all__ = [
    "Document",
    "Problem",
    "Unit",
    "bad_file",
    "fingerprint",
    "no_documents",
    "read_unit",
    "split_of",
    "split_position",
    "units",
]

UNIT_BYTES = 4 << 20
"""Large JSONL files are cut into units of about this size."""
MAX_PROBLEMS = 1000
"""Problems of one unit that are listed; the others are only counted."""
_PEEK_BYTES = 1 << 20


def units(cfg: DataConfig, source: str) -> list[Unit]:
    """What `source` is made of, in the order of the names of its files. Looks at sizes, footers and a few lines only.

    Units past data.max_bytes are left out, and the last one has a limit. A file that cannot be cut is one unit, whose
    reader reports why. Raises DataError 401 to 404 and 442 to 445, as `source_files`, and 440 as `read_unit`.
    """
    left = sys.maxsize if cfg.max_bytes is None else cfg.max_bytes
    found: list[Unit] = []
    for file in source_files(cfg, source):
        for unit in _cut(file, cfg):
            if left > 0:
                found.append(unit if unit.size <= left else replace(unit, limit=left))
            left -= unit.size
        if left <= 0:
            break
    if cfg.kind is not SampleKind.rows:
        return found
    first = (document for unit in found for document in read_unit(unit, replace(cfg, bad_files=BadFiles.skip), []))
    integers = isinstance(next(first, Document("", (), 0.0)).label, int)
    return [replace(unit, integers=integers) for unit in found]


def _cut(file: SourceFile, cfg: DataConfig) -> list[Unit]:
    form = _format(file, cfg)
    whole = Unit(file.name, file.path, form, file.size)
    try:
        if form == "parquet":
            sizes = row_groups(file.path, cfg)
            starts = [0, *accumulate(rows for rows, _ in sizes)]
            parts = [replace(whole, size=size, start=starts[i], part=i) for i, (_, size) in enumerate(sizes)]
            return parts or [whole]
        if form == "lines" and not is_compressed(file.path):
            borders = [*_line_starts(file.path, file.size), file.size]
            return [replace(whole, start=a, size=b - a) for a, b in zip(borders, borders[1:], strict=False)]
    except (OSError, BadInputError):  # the reader meets it again and reports it
        return [whole]
    return [whole]


def _line_starts(path: str, size: int) -> list[int]:
    starts, at = [0], UNIT_BYTES
    with open(path, "rb") as file:
        while at < size:
            file.seek(at - 1)
            file.readline()
            if file.tell() < size:
                starts.append(file.tell())
            at = file.tell() + UNIT_BYTES
    return starts


def _format(file: SourceFile, cfg: DataConfig) -> Format:
    suffix = plain_suffix(file.name)
    if suffix in (".parquet", ".arrow"):
        return "parquet" if suffix == ".parquet" else "arrow"
    if suffix in (".jsonl", ".ndjson"):
        return "lines"
    if cfg.kind is not SampleKind.text:
        return "lines" if suffix == ".json" else "table" if suffix in TABLE_SUFFIXES else "text"
    return "lines" if suffix == ".json" and _starts_with_record(file, cfg) else "text"


def _starts_with_record(file: SourceFile, cfg: DataConfig) -> bool:
    """Whether the first line of a .json file is an object with the text; otherwise the file itself is a text."""
    peek = b""
    try:
        for chunk in chunks(Unit(file.name, file.path, "text", file.size), cfg):
            peek += chunk
            if len(peek) >= _PEEK_BYTES or b"\n" in chunk:
                break
        return has_field(json.loads(peek.removeprefix(b"\xef\xbb\xbf").split(b"\n")[0]), cfg.text_field)
    except (OSError, BadInputError, ValueError, RecursionError):
        return False


def read_unit(unit: Unit, cfg: DataConfig, problems: list[Problem]) -> Iterator[Document]:
    """Documents of `unit`, in order. What cannot be used is added to `problems` and left out.

    Raises DataError: 440 for the first problem when data.bad_files is `stop`, 442 a package is not installed.
    """
    count = 0

    def report(path: str, reason: str) -> None:
        nonlocal count
        problem = Problem(path, reason)
        if cfg.bad_files is BadFiles.stop:
            raise bad_file(cfg, problem)
        count += 1
        if count <= MAX_PROBLEMS:
            problems.append(problem)

    try:
        yield from READERS[unit.format](unit, cfg, report)
    except OSError as error:
        report(unit.path, f"cannot be read ({error.strerror or error})")
    except BadInputError as error:
        report(unit.path, str(error))
    if count > MAX_PROBLEMS:
        problems.append(Problem(unit.path, f"{count - MAX_PROBLEMS} more problems"))


def bad_file(cfg: DataConfig, problem: Problem) -> Exception:
    """The refusal (440) of input that cannot be used, with data.bad_files=stop."""
    way_out = "Repair it, leave it out with data.exclude, or use data.bad_files=skip"
    return DataError.of(440, "data.bad_files", cfg.bad_files, str(problem), way_out)


def no_documents(cfg: DataConfig, source: str, num_units: int, problems: Sequence[Problem]) -> Exception:
    """The refusal (403) of a source none of whose `num_units` units gave a document."""
    listed = "; ".join(str(problem) for problem in problems[:3])
    rule = f"no document of data.kind={cfg.kind} is in it"
    way_out = "Give text files in UTF-8, or" if cfg.kind is SampleKind.text else "Give"
    way_out += f" records with {', '.join(fields(cfg))}"
    if cfg.max_bytes is not None:
        rule += f" within data.max_bytes={cfg.max_bytes}"
        way_out += ", or a larger data.max_bytes"
    rule += f" (units of files: {num_units}, problems: {len(problems)}" + (f", first: {listed})" if problems else ")")
    prefix, suffix = os.path.splitext(source)
    if suffix in (".bin", ".idx") and is_prefix(prefix):
        way_out = f"Give {prefix}, the prefix of {prefix}.bin and {prefix}.idx, and data.tokenizer"
    return DataError.of(403, option_of(cfg, source), source, rule, way_out)


def fingerprint(cfg: DataConfig, source: str) -> str:
    """Hex digest that changes when the documents of `source` change. Reads no file, so it costs milliseconds.

    For `python`, `python:NAME` and `hf:NAME`: names and sizes, and the interpreter's version, so that equal
    installations agree. For others names, sizes and times of modification, so that an edit of equal length counts.
    With them all options that choose what is read.
    """
    files = source_files(cfg, source)
    options: list[object] = [cfg.kind.value, fields(cfg), cfg.include, cfg.exclude, cfg.max_bytes]
    if source.split(":")[0] in (PYTHON_SOURCE, "hf"):
        facts: list[object] = [sys.implementation.name, platform.python_version()]
        facts += [(file.name, file.size) for file in files]
    else:
        facts = [(file.name, file.size, file.mtime_ns) for file in files]
    return hashlib.blake2b(json.dumps([options, facts]).encode(), digest_size=16).hexdigest()


def split_position(document: Document) -> float:
    """Where the hash of its texts puts `document` between 0 and 1; documents are spread evenly."""
    digest = hashlib.blake2b("\0".join(document.parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def split_of(position: float, cfg: DataConfig) -> str:
    """`valid` below data.valid_fraction, `test` below the sum with data.test_fraction, else `train`.

    `position` (see `split_position`) is decided by the content alone: order, names and other documents do not matter,
    and copies of one text never end up on both sides of a split.
    """
    if position < cfg.valid_fraction:
        return "valid"
    return "test" if position < cfg.valid_fraction + cfg.test_fraction else "train"
