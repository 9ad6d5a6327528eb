"""Text corpora: which files a source means, in which order, and which documents are held out for validation."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DataError

PYTHON_SOURCE = "python"
# fmt: off
TEXT_SUFFIXES = frozenset({
    ".adoc", ".c", ".cc", ".cfg", ".cpp", ".css", ".csv", ".go", ".h", ".hpp", ".html", ".ini", ".java", ".jl",
    ".js", ".json", ".jsonl", ".lua", ".md", ".org", ".py", ".pyi", ".r", ".rb", ".rs", ".rst", ".scala", ".sh",
    ".sql", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml",
})
# fmt: on
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Document:
    """One file of the corpus: `name` is its path relative to the source, `text` its content, never empty."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that belongs to a source, before it is read. `size` in bytes, `mtime_ns` in nanoseconds."""

    name: str
    path: Path
    size: int
    mtime_ns: int


def source_files(source: str) -> list[SourceFile]:
    """Files of `source`, sorted by name, so that the order is the same on every file system.

    `python` means the `.py` files of the running interpreter's standard library. A folder is searched recursively for
    files with one of `TEXT_SUFFIXES`; hidden folders and `__pycache__` are skipped. Anything else is a glob (`**`
    recurses), which may match any file whatever its suffix.

    Raises DataError: 401 nothing at that path, 402 no file fits.
    """
    if source == PYTHON_SOURCE:
        files = _walk(Path(sysconfig.get_paths()["stdlib"]), frozenset({".py"}))
    elif Path(source).is_dir():
        files = _walk(Path(source), TEXT_SUFFIXES)
    else:
        files = [_stat(name, Path(name)) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
        if not files:
            raise DataError.of(
                401,
                "data.source",
                source,
                f"no folder has this path and no file matches it as a glob, seen from {Path.cwd()}",
                "Give an existing folder, a quoted glob such as 'texts/**/*.txt', or data.source=python",
            )
    if not files:
        raise DataError.of(
            402,
            "data.source",
            source,
            f"the folder holds 0 files with one of the {len(TEXT_SUFFIXES)} known text suffixes (.txt, .md, .py, ...)",
            "Give a folder with such files, a glob that names the files, or data.source=python",
        )
    return sorted(files, key=lambda file: file.name)


def _walk(root: Path, suffixes: frozenset[str]) -> list[SourceFile]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n not in _SKIPPED_FOLDERS and not n.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in suffixes and path.is_file():
                found.append(_stat(path.relative_to(root).as_posix(), path))
    return found


def _stat(name: str, path: Path) -> SourceFile:
    info = path.stat()
    return SourceFile(name, path, info.st_size, info.st_mtime_ns)


def corpus_bytes(source: str, max_bytes: int | None) -> int:
    """Bytes that `documents` will read at most."""
    total = sum(file.size for file in source_files(source))
    return total if max_bytes is None else min(total, max_bytes)


def documents(source: str, max_bytes: int | None) -> Iterator[Document]:
    """Documents of `source`, in the order of their names, one in memory at a time.

    Files that are not valid UTF-8 and empty files are left out. After `max_bytes` bytes of text the rest is left out,
    and the last document is cut there (before a character that does not fit).

    Raises DataError: 401 and 402 as `source_files`, 403 no text at all, 404 a file cannot be read.
    """
    files = source_files(source)
    left = sys.maxsize if max_bytes is None else max_bytes
    found = False
    for file in files:
        if left <= 0:
            break
        content = _read(source, file)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if len(content) > left:
            text = content[:left].decode("utf-8", errors="ignore")
        left -= len(content)
        if text:
            found = True
            yield Document(file.name, text)
    if not found:
        raise DataError.of(
            403,
            "data.source",
            source,
            f"its {len(files)} files hold 0 bytes of UTF-8 text within data.max_bytes={max_bytes}",
            "Give a source with text, data.source=python, or a larger data.max_bytes",
        )


def _read(source: str, file: SourceFile) -> bytes:
    try:
        return file.path.read_bytes()
    except OSError as error:
        raise DataError.of(
            404,
            "data.source",
            source,
            f"{file.path} cannot be read ({error.strerror})",
            "Make the file readable, or give a glob that leaves it out",
        ) from error


def corpus_fingerprint(source: str, max_bytes: int | None) -> str:
    """Hex digest that changes when the corpus changes. Reads no file, so it costs milliseconds.

    For `python`: names, sizes and the interpreter's version, so that equal installations agree. For other sources:
    names, sizes and times of modification, so that an edit of equal length counts.
    """
    files = source_files(source)
    if source == PYTHON_SOURCE:
        facts: list[object] = [sys.implementation.name, platform.python_version()]
        facts += [(file.name, file.size) for file in files]
    else:
        facts = [(file.name, file.size, file.mtime_ns) for file in files]
    return hashlib.blake2b(json.dumps([max_bytes, facts]).encode(), digest_size=16).hexdigest()


def split_position(document: Document) -> float:
    """Where the content hash puts `document` between 0 and 1; documents are spread evenly."""
    digest = hashlib.blake2b(document.text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def is_validation(document: Document, fraction: float) -> bool:
    """Whether `document` is held out: its position lies below `fraction`.

    Decided by the content alone: order, names and other documents do not matter, and copies of one text never end up
    on both sides of the split.
    """
    return split_position(document) < fraction
