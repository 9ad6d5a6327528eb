"""Benchmark rows: one JSON object per measured figure, with everything needed to measure it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

from engine.observe.environment import environment


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of at least two values."""
    cuts = quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def row(
    *, case: str, system: str, metric: str, unit: str, values: Sequence[float], hardware: str, commit: str, **facts: Any
) -> dict[str, Any]:
    """A row. `facts` holds what else defines the figure: config hash, command, batch, loss, MFU."""
    around = environment()
    return {
        "case": case,
        "system": system,
        "metric": metric,
        "unit": unit,
        **percentiles(values),
        "n": len(values),
        "hardware": hardware,
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": around["python"], "cuda": around["cuda"], **around["packages"]},
        **facts,
    }


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a file, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in rows)
