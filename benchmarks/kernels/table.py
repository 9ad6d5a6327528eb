"""What `auto` knows of attention: `python -m benchmarks.kernels.table FILES > kernels/engine_kernels/measured.json`.

{"attention": {"sm90": [{"causal": true, "documents": false, "forward_backward_us": {"sdpa_cudnn": 1200.0}, ...}]}}, one
entry a line: medians of forward and backward together, of implementations that `auto` could name. Left out are quick
runs, grouped heads, and the systems that Octant has no way to call.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels.results import Row, figures, paths_of, read

KEYS = ("head_dim", "causal", "documents", "length")
_NOT_OURS = ("triton tutorial", "dense ")


def entries(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By architecture, one entry for each head dim, mask, packing and length, in this order."""
    found: dict[str, dict[tuple[int, ...], Row]] = {}
    for row in figures(rows, metric="fwd+bwd", quick=False):
        if row["suite"] not in ("attention", "documents") or row["heads"] != row["kv_heads"]:
            continue
        if row["system"].startswith(_NOT_OURS):
            continue
        key = tuple(int(row[name]) for name in KEYS)
        blank = {name: row[name] for name in KEYS} | {"forward_backward_us": {}}
        entry = found.setdefault(row["architecture"], {}).setdefault(key, blank)
        entry["forward_backward_us"][row["system"]] = round(row["p50"] * 1e6, 1)
        entry |= {"hardware": row["hardware"], "versions": row["versions"]}
    return {name: [entry for _, entry in sorted(table.items())] for name, table in sorted(found.items())}


def text_of(rows: Sequence[Row]) -> str:
    """The table as JSON."""
    parts = []
    for name, table in entries(rows).items():
        lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in table)
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    return '{"attention": {' + ",\n".join(parts) + "}}\n"


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.table")
    parser.add_argument("files", type=Path, nargs="+", help="rows.jsonl, or folders with one; later ones win")
    options = parser.parse_args(argv)
    sys.stdout.write(text_of(read(paths_of(options.files))))


if __name__ == "__main__":
    main(sys.argv[1:])
