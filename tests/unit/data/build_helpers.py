"""What the tests of building share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.schema_data import DataConfig
from engine.data.build.cache import entries, read_meta
from engine.data.build.prepare import prepare
from engine.errors import DataError


def quiet(line: str) -> None:
    pass


def make_corpus(root: Path, files: int, lines: int = 3) -> Path:
    """Small texts in `root`/corpus; `root` again."""
    (root / "corpus").mkdir()
    for i in range(files):
        (root / "corpus" / f"{i:02}.txt").write_text(f"document {i} has number {i * i}\n" * lines)
    return root


def built(cfg: DataConfig, say: Callable[[str], None] = quiet, shard_bytes: int | None = None) -> Path:
    """The entry of the only source, built if need be."""
    prepare(cfg, say, shard_bytes=shard_bytes)
    ((folder, share),) = entries(cfg)
    assert share == 1
    return folder


def refused(cfg: DataConfig) -> str:
    """The message of the refusal to build."""
    with pytest.raises(DataError) as caught:
        prepare(cfg, quiet)
    return str(caught.value)


def counts(folder: Path) -> dict[str, int]:
    """Documents of each split."""
    return {name: split["documents"] for name, split in read_meta(folder)["splits"].items()}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
