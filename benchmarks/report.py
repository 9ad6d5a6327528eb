"""`python -m benchmarks.report [FILE ...]`: result rows as tables, the newest last. Default: all of `results/`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table of rows, one line each; a breakdown becomes one line of its parts."""
    yield "| case | system | metric | p50 [p20, p80] | tok/s | MFU C / F | peak GiB | commit |"
    yield "|---|---|---|---|---|---|---|---|"
    for entry in rows:
        yield "| " + " | ".join(_cells(entry)) + " |"


def _cells(entry: dict[str, Any]) -> list[str]:
    metric = f"{entry['metric']} ({entry['unit']})"
    if "values" in entry:
        figure = ", ".join(f"{name} {value:.1f}" for name, value in entry["values"].items())
    elif "value" in entry:
        figure = f"{entry['value']:.2e}"
    else:
        figure = f"{entry['p50']:.4g} [{entry['p20']:.4g}, {entry['p80']:.4g}]"
    mfu = f"{entry['mfu_c']:.1%} / {entry['mfu_f']:.1%}" if entry.get("mfu_c") else ""
    tokens = f"{entry['tokens_per_s']:,.0f}" if "tokens_per_s" in entry else ""
    peak = f"{entry['peak_memory_gib']:.1f}" if "peak_memory_gib" in entry else ""
    return [entry["case"], entry["system"], metric, figure, tokens, mfu, peak, entry["commit"]]


def main(argv: list[str]) -> None:
    """Print a table per file."""
    for path in [Path(word) for word in argv] or sorted(RESULTS.rglob("*.jsonl")):
        rows = [json.loads(text) for text in path.read_text().splitlines()]
        print(f"\n{path.name}, {rows[0]['hardware']}, {rows[0].get('versions', {}).get('torch', '')}\n")
        print("\n".join(lines(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
