"""Tables, curves and targets of kernel rows: `python -m benchmarks.kernels.report [FILES] [--out FOLDER] [--targets]`.

Prints Markdown and writes PNG beside the first file, or to --out. Default: all that is kept in `results/kernels`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.kernels.pictures import draw_all
from benchmarks.kernels.results import Row, paths_of, read
from benchmarks.kernels.targets import target_lines

RATES = {"tflops": "TFLOP/s", "gb_per_s": "GB/s"}


def caption(rows: Sequence[Row]) -> str:
    """Hardware, versions and commits of rows."""
    versions: dict[str, set[str]] = {}
    for entry in rows:
        for name, version in entry["versions"].items():
            if version is not None and name in ("torch", "cuda", "cudnn", "triton", "liger-kernel") + _FLASH:
                versions.setdefault(name, set()).add(str(version))
    parts = [f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()]
    words = [rows[0]["hardware"], *parts, "commit " + " and ".join(sorted({entry["commit"] for entry in rows}))]
    quick = any(entry["quick"] for entry in rows)
    return ", ".join(words) + ("; a quick run with tiny shapes, which measures nothing" if quick else "")


_FLASH = ("flash-attn-4", "flash-attn")


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """A table of one suite: one line for each system of each case, one column for each metric."""
    metrics = list(dict.fromkeys(entry["metric"] for entry in rows if "unavailable" not in entry))
    yield "| case | system | " + " | ".join(_title(rows, metric) for metric in metrics) + " | error |"
    yield "|" + "---|" * (len(metrics) + 3)
    systems: dict[tuple[str, str], list[Row]] = {}
    for case in dict.fromkeys(entry["case"] for entry in rows):
        for entry in rows:
            if entry["case"] == case:
                systems.setdefault((case, entry["system"]), []).append(entry)
    for (case, system), found in systems.items():
        if why := next((entry["unavailable"] for entry in found if "unavailable" in entry), ""):
            # Without a figure there is no column for the reason.
            cells = [why.replace("|", "/"), *[""] * (len(metrics) - 1), ""] if metrics else [why]
        else:
            by_metric = {entry["metric"]: entry for entry in found}
            cells = [_cell(by_metric[metric]) if metric in by_metric else "" for metric in metrics]
            error = next((entry["error"] for entry in found if "error" in entry), None)
            cells.append("" if error is None else f"{error:.1e}")
        yield f"| {case} | {system} | " + " | ".join(cells) + " |"


def _title(rows: Sequence[Row], metric: str) -> str:
    units = {"s": "ms", "GiB": "GiB", "x": "x", "ratio": ""}
    unit = next(units[entry["unit"]] for entry in rows if entry["metric"] == metric)
    return f"{metric} ({unit})" if unit else metric


def _cell(entry: Row) -> str:
    if entry["unit"] == "s":
        text = f"{entry['p50'] * 1e3:.4g} [{entry['p20'] * 1e3:.4g}, {entry['p80'] * 1e3:.4g}]"
        rates = [f"{entry[name]:,.0f} {unit}" for name, unit in RATES.items() if name in entry]
        return ", ".join([text, *rates])
    if "chosen" in entry:
        return f"{entry['p50']:.3f}: {entry['chosen']}, best {entry['best']}"
    if entry["metric"].startswith("of copy"):
        return f"{entry['p50']:.1%} [{entry['p20']:.1%}, {entry['p80']:.1%}]"
    return f"{entry['p50']:.3g}" + (f" [{entry['p20']:.3g}, {entry['p80']:.3g}]" if entry["n"] > 1 else "")


def main(argv: list[str]) -> None:
    """Print tables and write pictures, for each kind of hardware."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.report")
    parser.add_argument("files", type=Path, nargs="*", help="rows.jsonl, or folders with one; later ones win")
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: beside the first file")
    parser.add_argument("--targets", action="store_true", help="say of each target whether it is met")
    options = parser.parse_args(argv)
    paths = paths_of(options.files)
    if not paths or not all(path.is_file() for path in paths):
        parser.error(f"no rows at {', '.join(map(str, [p for p in paths if not p.is_file()])) or 'results/kernels'}")
    rows, out = read(paths), options.out or paths[0].parent
    out.mkdir(parents=True, exist_ok=True)
    for hardware in dict.fromkeys(entry["hardware"] for entry in rows):
        here = [entry for entry in rows if entry["hardware"] == hardware]
        for suite in dict.fromkeys(entry["suite"] for entry in here):
            of_suite = [entry for entry in here if entry["suite"] == suite]
            print(f"\n## {suite}\n\n{caption(of_suite)}\n")
            print("\n".join(lines(of_suite)))
        for path in draw_all(here, out, caption(here)):
            print(f"\nwrote {path}")
        if options.targets:
            print(f"\n## targets, {hardware}\n")
            print("\n".join(target_lines(here)))


if __name__ == "__main__":
    main(sys.argv[1:])
