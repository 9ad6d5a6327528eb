"""What a corpus is made of: documents, the units of work they are read in, and the problems met on the way.

Nothing here opens a file or imports a library, so that processes which only pass units on start fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from engine.config.schema_data import DataConfig
from engine.errors import DataError

Format = Literal["text", "lines", "table", "parquet", "arrow"]
"""`text`: the file is one document. `lines`: JSONL. `table`: CSV or TSV. `arrow`: a shard of `datasets`."""
Report = Callable[[str, str], None]
"""Takes the path (with the line) and the reason of a problem."""


@dataclass(frozen=True, slots=True)
class Document:
    """One sample of the corpus: `name` tells where it comes from.

    `parts`: (text,) of kind=text; (prompt, completion) of kind=completion; (text,) or (text, pair) of kind=rows, which
    has a `label`: an int (a class) or a float (a score), of one type in the whole corpus. Only a prompt may be empty.
    """

    name: str
    parts: tuple[str, ...]
    label: float | None = None

    @property
    def size(self) -> int:
        """Bytes of its text in UTF-8."""
        return sum(len(part) if part.isascii() else len(part.encode()) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Problem:
    """Input that was left out: its file (and line or row), and the exact reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work that can be read alone, by any process that sees the file.

    `size`: bytes on disk (Parquet: of the row group before compression). `start`: first byte of `lines`, first row of
    `parquet`. `part`: row group of `parquet`; None: the whole file. `limit`: only this many of the `size` bytes belong
    to the corpus (data.max_bytes). `integers`: whether the labels of the corpus are integers (kind=rows).
    """

    name: str
    path: str
    format: Format
    size: int
    start: int = 0
    part: int | None = None
    limit: int | None = None
    integers: bool | None = None


class BadInputError(Exception):
    """A file or record that cannot be used; the message is the reason."""


def option_of(cfg: DataConfig, source: str) -> str:
    """The option that names `source`."""
    return "data.blend" if source in cfg.blend else "data.source"


def optional(module: str, cfg: DataConfig, source: str) -> Any:
    """Import a module of a package that only some sources need. Raises DataError 442 when it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        rule = f"it is read with the package {package}, which cannot be imported ({error})"
        raise DataError.of(442, option_of(cfg, source), source, rule, f"Run: pip install {package}") from error
