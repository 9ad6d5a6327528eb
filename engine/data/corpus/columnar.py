"""Readers of Parquet row groups and of the Arrow streams that `datasets` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.config.schema_data import DataConfig
from engine.data.corpus.records import document_of, fields, settled
from engine.data.corpus.units import BadInputError, Document, Report, Unit, optional

_BATCH_ROWS = 1024


def row_groups(path: str, cfg: DataConfig) -> list[tuple[int, int]]:
    """(rows, bytes before compression) of each row group of a Parquet file. Raises BadInputError, DataError 442."""
    with _parquet(path, cfg) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def read_parquet(unit: Unit, cfg: DataConfig, report: Report) -> Iterator[Document]:
    """One document a row of the unit's row group; with a limit the first rows, as many as their share of its bytes."""
    with _parquet(unit.path, cfg) as file:
        if unit.part is None:
            raise BadInputError("has no rows")
        wanted = fields(cfg)
        _check_columns(wanted, {file.schema.column(index).path for index in range(len(file.schema))})
        batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[unit.part], columns=wanted)
        yield from _documents(batches, file.metadata.row_group(unit.part).num_rows, unit, cfg, report)


def read_arrow(unit: Unit, cfg: DataConfig, report: Report) -> Iterator[Document]:
    """One document a row of the shard, a memory-mapped Arrow stream; with a limit as `read_parquet`."""
    pyarrow, ipc = optional("pyarrow", cfg, unit.path), optional("pyarrow.ipc", cfg, unit.path)
    with _named_errors(cfg), pyarrow.memory_map(unit.path) as file:
        batches = list(ipc.open_stream(file))
        count = sum(batch.num_rows for batch in batches)
        if count == 0:
            raise BadInputError("has no rows")
        names = set(batches[0].schema.names)
        columns = list(dict.fromkeys(name if name in names else name.split(".")[0] for name in fields(cfg)))
        _check_columns(columns, names)
        starts = ((batch, start) for batch in batches for start in range(0, batch.num_rows, _BATCH_ROWS))
        selected = (batch.slice(start, _BATCH_ROWS).select(columns) for batch, start in starts)
        yield from _documents(selected, count, unit, cfg, report)


def _check_columns(wanted: Iterable[str], columns: set[str]) -> None:
    for name in wanted:
        if name not in columns:
            raise BadInputError(f"has no column {name!r}; its columns: {', '.join(sorted(columns))}")


def _documents(batches: Iterable[Any], count: int, unit: Unit, cfg: DataConfig, report: Report) -> Iterator[Document]:
    kept = count if unit.limit is None else count * unit.limit // unit.size
    integers, number = unit.integers, unit.start
    for batch in batches:
        for record in _records(batch):
            if number - unit.start >= kept:
                return
            number += 1
            try:
                if isinstance(record, BadInputError):
                    raise record
                document = document_of(record, f"{unit.name}:{number}", cfg, integers)
            except BadInputError as error:
                report(f"{unit.path}, row {number}", str(error))
            else:
                integers = settled(integers, document)
                yield document


def _records(batch: Any) -> list[Any]:
    """The rows of `batch`; in place of one whose text is not UTF-8, which no library checks before, the reason."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadInputError(f"is not UTF-8 ({error.reason} at offset {error.start} of a text)")]
        return [record for row in range(batch.num_rows) for record in _records(batch.slice(row, 1))]


@contextmanager
def _parquet(path: str, cfg: DataConfig) -> Iterator[Any]:
    module = optional("pyarrow.parquet", cfg, path)
    with _named_errors(cfg), module.ParquetFile(path) as file:
        yield file


@contextmanager
def _named_errors(cfg: DataConfig) -> Iterator[None]:
    """Turn the library's errors about damaged files into BadInputError."""
    pyarrow = optional("pyarrow", cfg, "Parquet")
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInputError(f"cannot be read ({str(error).strip().split(chr(10))[0]})") from error
