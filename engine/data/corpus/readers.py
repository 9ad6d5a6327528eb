"""Readers of text, JSONL and tables. Bad input is reported and left out."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from engine.config.enums import SampleKind
from engine.config.schema_data import DataConfig
from engine.data.corpus.columnar import read_arrow, read_parquet
from engine.data.corpus.content import chunks, is_compressed
from engine.data.corpus.records import document_of, settled
from engine.data.corpus.units import BadInputError, Document, Format, Report, Unit

_BOM = "\ufeff"
_COUNTED_BYTES = 1 << 30
"""Lines before a unit are counted up to here, to name the line of a problem; beyond it the byte is named."""
_BLOCK = 1 << 24


def read_text(unit: Unit, cfg: DataConfig, report: Report) -> Iterator[Document]:
    """The whole file as one document; with a limit cut there, before a character that does not fit."""
    if cfg.kind is not SampleKind.text:
        open(unit.path, "rb").close()  # what cannot be opened is reported as that
        report(unit.path, f"holds no records: data.kind={cfg.kind} reads .jsonl, .csv, .tsv and .parquet files")
        return
    text = _decoded(unit, cfg)
    if text:
        yield Document(unit.name, (text,))


def _decoded(unit: Unit, cfg: DataConfig) -> str:
    content = b"".join(chunks(unit, cfg))
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final=unit.limit is None)
    except UnicodeDecodeError as error:
        raise BadInputError(_not_utf8(error, 0)) from error
    text = text.removeprefix(_BOM)
    if not text and unit.limit is None:
        raise BadInputError("is empty")
    return text


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    return f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start} ({error.reason})"


def read_lines(unit: Unit, cfg: DataConfig, report: Report) -> Iterator[Document]:
    """One document a line, each a JSON object; blank lines are no records."""
    place, integers, number, empty = _place_of(unit), unit.integers, 0, True
    for number, (offset, line) in enumerate(_lines(unit, cfg), start=1):
        if not line or line.isspace():
            continue
        empty = False
        try:
            text = line.decode().rstrip("\r\n")
            text = text.removeprefix(_BOM) if offset == 0 else text
            document = document_of(json.loads(text), f"{unit.name}@{offset}", cfg, integers)
        except UnicodeDecodeError as error:
            report(place(number, offset), _not_utf8(error, offset))
        except json.JSONDecodeError as error:
            report(place(number, offset), f"is not a JSON object ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or nested too deep
            report(place(number, offset), f"is not a JSON object that can be read ({error})")
        except BadInputError as error:
            report(place(number, offset), str(error))
        else:
            integers = settled(integers, document)
            yield document
    if empty and unit.start == 0 and unit.limit is None:
        raise BadInputError("is empty")


def _lines(unit: Unit, cfg: DataConfig) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the unit's lines; with a limit only those that end before it."""
    if is_compressed(unit.path):
        yield from _split(unit, cfg)
        return
    stop = unit.start + (unit.size if unit.limit is None else unit.limit)
    with open(unit.path, "rb", buffering=1 << 20) as file:
        file.seek(unit.start)
        offset = unit.start
        for line in file:
            if offset + len(line) > stop:
                return
            yield offset, line
            offset += len(line)


def _split(unit: Unit, cfg: DataConfig) -> Iterator[tuple[int, bytes]]:
    offset, pending = 0, list[bytes]()
    for chunk in chunks(unit, cfg):
        *whole, tail = chunk.split(b"\n")
        for line in whole:
            pending.append(line)
            joined = b"".join(pending)
            yield offset, joined
            offset += len(joined) + 1
            pending.clear()
        pending.append(tail)
    if unit.limit is None and any(pending):
        yield offset, b"".join(pending)


def _place_of(unit: Unit) -> Callable[[int, int], str]:
    """From the number of a line in the unit and its offset to a phrase that names it in the file."""
    before: int | None = None

    def place(number: int, offset: int) -> str:
        nonlocal before
        if unit.start > _COUNTED_BYTES:
            return f"{unit.path}, line at byte {offset}"
        if before is None:
            before = _newlines(unit.path, unit.start)
        return f"{unit.path}:{before + number}"

    return place


def _newlines(path: str, stop: int) -> int:
    count = 0
    with open(path, "rb") as file:
        for start in range(0, stop, _BLOCK):
            count += file.read(min(_BLOCK, stop - start)).count(b"\n")
    return count


def read_table(unit: Unit, cfg: DataConfig, report: Report) -> Iterator[Document]:
    """One document a row of a file with a header. CSV is quoted as RFC 4180 says, TSV is not quoted at all (IANA)."""
    text = _decoded(unit, cfg)
    if unit.limit is not None:
        text = text[: text.rfind("\n") + 1]
    csv.field_size_limit(sys.maxsize)
    is_tsv = ".tsv" in unit.path.lower()[-8:]
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"strict": True}
    rows = csv.DictReader(io.StringIO(text, newline=""), restkey=None, **style)
    integers = unit.integers
    while True:
        try:
            row: dict[Any, Any] = next(rows)
            document = _row_document(row, rows.line_num, unit, cfg, integers)
        except StopIteration:
            return
        except csv.Error as error:
            if unit.limit is None:
                report(f"{unit.path}:{rows.line_num}", f"is not a row of CSV ({error})")
            return
        except BadInputError as error:
            report(f"{unit.path}:{rows.line_num}", str(error))
        else:
            integers = settled(integers, document)
            yield document


def _row_document(row: dict[Any, Any], line: int, unit: Unit, cfg: DataConfig, integers: bool | None) -> Document:
    header = [name for name in row if name is not None]
    width = sum(row[name] is not None for name in header) + len(row.get(None) or ())
    if width != len(header):
        raise BadInputError(f"has {width} columns, the header has {len(header)}")
    if cfg.kind is SampleKind.rows and cfg.label_field in row:
        row[cfg.label_field] = _number(row[cfg.label_field])
    return document_of(row, f"{unit.name}:{line}", cfg, integers)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


READERS: dict[Format, Callable[[Unit, DataConfig, Report], Iterator[Document]]] = {
    "text": read_text,
    "lines": read_lines,
    "table": read_table,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
