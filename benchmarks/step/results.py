"""Rows of this suite in result files, the newest of each figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.step.contest import SUITE

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results" / SUITE


def read(paths: Sequence[Path]) -> list[Row]:
    """Rows of `paths` in their order; a later one takes the place of an earlier one for the same figure.

    A system that could not run once and could later, or the other way round, has what was written last. Rows of other
    suites, and those from before there were cases, are passed over.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for path in paths:
        for text in path.read_text().splitlines():
            entry = json.loads(text)
            if entry.get("suite") != SUITE:
                continue
            whose = (entry["hardware"], entry["quick"], entry["case"], entry["system"])
            for key in [key for key in found if key[:4] == whose and "unavailable" in {**found[key], **entry}]:
                # One of the two says that the system has no figure: the older no longer holds.
                del found[key]
            found[*whose, entry["metric"]] = entry
    return list(found.values())


def figure(rows: Sequence[Row], case: str, system: str, metric: str = "step") -> Row | None:
    """The row with this figure."""
    wanted = (case, system, metric)
    return next((row for row in rows if (row["case"], row["system"], row["metric"]) == wanted), None)


def paths_of(words: Sequence[Path]) -> list[Path]:
    """The files named; of a folder all its row files, oldest first; none named: all that are kept."""
    if not words:
        return sorted(RESULTS.rglob("*.jsonl"))
    return [file for path in words for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
