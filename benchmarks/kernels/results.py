"""Rows of result files, the newest of each figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results" / "kernels"


def read(paths: Sequence[Path]) -> list[Row]:
    """Rows of `paths` in their order; a later one takes the place of an earlier one for the same figure.

    A system that could not run once and could later, or the other way round, has what was written last.
    """
    found: dict[tuple[str, ...], Row] = {}
    for path in paths:
        for text in path.read_text().splitlines():
            entry = json.loads(text)
            whose = (entry["architecture"], entry["case"], entry["system"])
            for key in [key for key in found if key[:3] == whose and _ends(found[key], entry)]:
                del found[key]
            found[*whose, entry["metric"]] = entry
    return list(found.values())


def _ends(old: Row, new: Row) -> bool:
    """Whether `new` says that the system of `old` could not run, or that it can again."""
    return ("unavailable" in old) != ("unavailable" in new)


def figures(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows with a figure that have these facts."""
    return [
        entry
        for entry in rows
        if "unavailable" not in entry and all(entry.get(key) == value for key, value in wanted.items())
    ]


def paths_of(words: Sequence[Path]) -> list[Path]:
    """The files named; of a folder all its row files, oldest first; none named: all that are kept."""
    if not words:
        return sorted(RESULTS.rglob("*.jsonl"))
    return [file for path in words for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
