"""Which files a source means, in which order."""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from engine.config.enums import SampleKind
from engine.config.schema_data import DataConfig
from engine.data.corpus.saved import hub_shards, saved_shards
from engine.data.corpus.units import option_of
from engine.errors import DataError, nearest

PYTHON_SOURCE = "python"
HUB_PREFIX = "hf:"
# fmt: off
TEXT_SUFFIXES = frozenset({
    ".adoc", ".c", ".cc", ".cfg", ".cpp", ".css", ".csv", ".go", ".h", ".hpp", ".html", ".ini", ".java", ".jl",
    ".js", ".json", ".lua", ".md", ".org", ".py", ".pyi", ".r", ".rb", ".rs", ".rst", ".scala", ".sh",
    ".sql", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml",
})
# fmt: on
RECORD_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".parquet"})
TABLE_SUFFIXES = frozenset({".csv", ".tsv"})
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that belongs to a source, before it is read. `size` in bytes, `mtime_ns` in nanoseconds."""

    name: str
    path: str
    size: int
    mtime_ns: int


def plain_suffix(name: str) -> str:
    """Suffix of `name` in lower case, without that of a compression: `.jsonl` of `a.JSONL.gz`."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def source_files(cfg: DataConfig, source: str) -> list[SourceFile]:
    """Files of `source`, sorted by name, so that the order is the same on every file system.

    `python`: the `.py` files of the running interpreter's standard library; `python:all`: and of everything installed;
    `python:NAME`: of one installed package. A folder is searched recursively for the suffixes that data.kind can
    read (and those that data.include names); hidden folders and `__pycache__` are skipped. A folder saved by
    `datasets`, and `hf:NAME`, mean the shards of one split. Anything else is a file or a glob (`**` recurses), which
    may match any file whatever its suffix. data.include and data.exclude then choose by name.

    Raises DataError: 401 nothing at that path, 402 no file fits, 404 a listing cannot be read, 442 a package that this
    needs is missing, 443 `datasets` cannot load it, 444 no such installed package, 445 no such split.
    """
    if source == PYTHON_SOURCE or source.startswith(f"{PYTHON_SOURCE}:"):
        # An installation is full of empty __init__.py files: nobody's mistake.
        found = [file for file in _python_files(cfg, source) if file.size]
    elif source.startswith(HUB_PREFIX):
        found = [_stat(name, path) for name, path in hub_shards(cfg, source, source.removeprefix(HUB_PREFIX))]
    elif (saved := saved_shards(cfg, source)) is not None:
        found = [_stat(name, path) for name, path in saved]
    elif os.path.isdir(source):
        found = _walk(Path(source), _suffixes(cfg))
    else:
        found = _matched(cfg, source)
    files = [file for file in found if _chosen(file.name, cfg)]
    if not files:
        raise _no_files(cfg, source, len(found))
    return sorted(files, key=lambda file: file.name)


def _python_files(cfg: DataConfig, source: str) -> list[SourceFile]:
    paths, suffix = sysconfig.get_paths(), frozenset({".py"})
    name = source.partition(":")[2]
    if not name:
        return _walk(Path(paths["stdlib"]), suffix)
    if name == "all":
        roots = {"stdlib": paths["stdlib"], "purelib": paths["purelib"]}
        if not os.path.samefile(paths["purelib"], paths["platlib"]):
            roots["platlib"] = paths["platlib"]
        return [file for label, root in roots.items() for file in _walk(Path(root), suffix, f"{label}/")]
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or (spec.submodule_search_locations is None and not (spec.origin or "").endswith(".py")):
        installed = {
            path.stem for path in Path(paths["purelib"]).glob("*") if path.stem.isidentifier() and path.stem[0] != "_"
        }
        rule = f"the interpreter {sys.executable} has no package of .py files called {name!r}"
        way_out = f"{nearest(name, installed)}; python:all means all of them"
        raise DataError.of(444, option_of(cfg, source), source, rule, way_out)
    if spec.submodule_search_locations is None:
        return [_stat(f"{name}.py", str(spec.origin))]
    return [file for root in spec.submodule_search_locations for file in _walk(Path(root), suffix, f"{name}/")]


def _suffixes(cfg: DataConfig) -> frozenset[str]:
    known = RECORD_SUFFIXES | (TEXT_SUFFIXES if cfg.kind is SampleKind.text else TABLE_SUFFIXES)
    return (known | {plain_suffix(pattern) for pattern in _patterns(cfg.include)}) - {""}


def _walk(root: Path, suffixes: frozenset[str], prefix: str = "") -> list[SourceFile]:
    found: list[SourceFile] = []

    def unreadable(error: OSError) -> None:
        """A folder that cannot be listed is met again by the reader, which reports why."""
        path = Path(error.filename)
        found.append(SourceFile(prefix + path.relative_to(root).as_posix(), str(path), 0, 0))

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = [n for n in subfolders if n not in _SKIPPED_FOLDERS and not n.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if plain_suffix(name) not in suffixes:
                continue
            try:
                if path.is_file():
                    found.append(_stat(prefix + path.relative_to(root).as_posix(), str(path)))
            except OSError as error:  # a folder whose files may be named but not looked at
                unreadable(error)
    return found


def _matched(cfg: DataConfig, source: str) -> list[SourceFile]:
    paths = [source] if os.path.isfile(source) else glob.glob(source, recursive=True)
    files = [_stat(path, path) for path in paths if os.path.isfile(path)]
    if not files:
        rule = f"no folder has this path and no file matches it as a glob, seen from {Path.cwd()}"
        way_out = "Give an existing folder, a quoted glob such as 'texts/**/*.txt', or data.source=python"
        for there, absent in ((".bin", ".idx"), (".idx", ".bin")):
            if os.path.isfile(source + there):
                rule += f"; as a Megatron prefix it has {source}{there} and lacks {source}{absent}"
                way_out = f"Put {Path(source).name}{absent} beside {Path(source).name}{there}"
        raise DataError.of(401, option_of(cfg, source), source, rule, way_out)
    return files


def _stat(name: str, path: str) -> SourceFile:
    info = os.stat(path)
    return SourceFile(name, path, info.st_size, info.st_mtime_ns)


def _patterns(text: str) -> list[str]:
    return [pattern for part in text.split(",") if (pattern := part.strip())]


def _chosen(name: str, cfg: DataConfig) -> bool:
    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return matches(_patterns(cfg.include)) and not matches(_patterns(cfg.exclude))


def _no_files(cfg: DataConfig, source: str, found: int) -> Exception:
    option = option_of(cfg, source)
    if found:
        rule = f"none of its {found} files is left by data.include={cfg.include} and data.exclude={cfg.exclude}"
        way_out = "Give data.include a pattern of paths inside the source, such as '*.md' or 'docs/*'"
        return DataError.of(402, option, source, rule, way_out)
    known = _suffixes(cfg)
    shown = ", ".join(s for s in (".txt", ".md", ".py", ".jsonl", ".csv", ".parquet") if s in known)
    return DataError.of(
        402,
        option,
        source,
        f"the folder holds 0 files with one of the {len(known)} suffixes of data.kind={cfg.kind} ({shown}, ...)",
        "Give a folder with such files, a glob that names the files, or data.source=python",
    )
