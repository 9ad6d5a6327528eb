"""Tables, targets and a picture of step rows: `python -m benchmarks.step.report [FILES | FOLDERS] [--targets]`.

Prints Markdown and writes a PNG beside the first file, or to --out. Default: all that is kept in `results/step`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.step.breakdown import GAPS, PARTS
from benchmarks.step.picture import draw
from benchmarks.step.results import Row, figure, paths_of, read
from benchmarks.step.systems import REFERENCE
from benchmarks.step.targets import loss_difference, target_lines


def caption(rows: Sequence[Row]) -> str:
    """Hardware, versions and commits of rows."""
    versions: dict[str, set[str]] = {}
    for entry in rows:
        for name in ("torch", "cuda", "cudnn", "triton", "deepspeed", "transformers", "liger-kernel"):
            if version := entry["versions"].get(name):
                versions.setdefault(name, set()).add(str(version))
    parts = [f"{name} {' and '.join(sorted(found))}" for name, found in versions.items()]
    words = [rows[0]["hardware"], *parts, "commit " + " and ".join(sorted({entry["commit"] for entry in rows}))]
    quick = any(entry["quick"] for entry in rows)
    return ", ".join(words) + ("; a quick run with tiny shapes, which measures nothing" if quick else "")


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each system of each case. MFU is a share of the bf16 peak: C counts half of attention, F all."""
    yield (
        "| case | GPUs | system | step ms [p20, p80] | n | tok/s per GPU | sequences/s | MFU C / F | HFU | peak GiB "
        "| loss (from fp32) |"
    )
    yield "|" + "---|" * 11
    for row in rows:
        head = f"| {row['case']} | {row['gpus']} | {row['system']} |"
        if "unavailable" in row:
            yield f"{head} {row['unavailable'].replace('|', '/')} |" + " |" * 7
        elif row["metric"] == "step":
            yield f"{head} " + " | ".join(_cells(row, rows)) + " |"
        elif row["system"] == REFERENCE:
            yield f"{head} |" + " |" * 6 + f" {row['p50']:.5f} at step {row['step']}, products in {row['products']} |"


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    known = row["mfu_c"] is not None
    return [
        f"{row['p50'] * 1e3:.4g} [{row['p20'] * 1e3:.4g}, {row['p80'] * 1e3:.4g}]",
        str(row["n"]),
        f"{row['tokens_per_s_per_gpu']:,.0f}",
        f"{row['samples_per_s']:,.1f}",
        f"{row['mfu_c']:.1%} / {row['mfu_f']:.1%}" if known else "",
        f"{row['hfu']:.1%}" if known else "",
        "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}",
        _loss(row, rows),
    ]


def _loss(row: Row, rows: Sequence[Row]) -> str:
    difference = loss_difference(row, rows)
    if not row["losses"]:
        return "none: one rank alone"
    if difference is None:
        step, loss = list(row["losses"].items())[-1]
        return f"{loss:.5f} at step {step}"
    reference = figure(rows, row["case"], REFERENCE, "loss")
    assert reference is not None
    return f"{row['losses'][str(reference['step'])]:.5f} ({difference:+.3%})"


def breakdown_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Where a profiled step of rank 0 goes; `gaps by the median`: of a step without the profiler."""
    yield "| case | system | " + " | ".join(PARTS) + " | sum (ms) | median step | gaps by the median |"
    yield "|" + "---|" * (len(PARTS) + 5)
    for row in rows:
        if row["metric"] != "breakdown" or not row["parts"]:
            continue
        step = figure(rows, row["case"], row["system"])
        total = sum(row["parts"].values())
        cells = [f"{row['parts'][name]:.1f}" for name in PARTS] + [f"{total:.1f}"]
        if step is not None:
            cells += [f"{step['p50'] * 1e3:.1f}", f"{step['p50'] * 1e3 - total + row['parts'][GAPS]:.1f}"]
        yield f"| {row['case']} | {row['system']} | " + " | ".join(cells) + " |"


def gap_lines(rows: Sequence[Row], least_ms: float = 0.5) -> Iterator[str]:
    """The stretches of a profiled step in which the device waits for `least_ms` or more."""
    yield "| case | system | ms | after | before | the host meanwhile |"
    yield "|" + "---|" * 6
    for row in rows:
        for gap in row.get("longest_gaps", []):
            if gap["ms"] >= least_ms:
                words = [gap["after"][:60], gap["before"][:60], ", ".join(gap["host"])]
                cells = " | ".join(word.replace("|", "/") for word in words)
                yield f"| {row['case']} | {row['system']} | {gap['ms']:.2f} | {cells} |"


def main(argv: list[str]) -> None:
    """Print tables and draw a picture, for each kind of hardware, quick runs by themselves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.report")
    parser.add_argument("files", type=Path, nargs="*", help="rows.jsonl, or folders with one; later ones win")
    parser.add_argument("--out", type=Path, help="folder of the picture; default: beside the first file")
    parser.add_argument("--targets", action="store_true", help="say of each target whether it is met")
    options = parser.parse_args(argv)
    paths = paths_of(options.files)
    if not paths or not all(path.is_file() for path in paths):
        parser.error(f"no rows at {', '.join(map(str, [p for p in paths if not p.is_file()])) or 'results/step'}")
    rows, out = read(paths), options.out or paths[0].parent
    if not rows:
        parser.error(f"{', '.join(map(str, paths))}: no row of this suite")
    out.mkdir(parents=True, exist_ok=True)
    for hardware, quick in dict.fromkeys((row["hardware"], row["quick"]) for row in rows):
        here = [row for row in rows if (row["hardware"], row["quick"]) == (hardware, quick)]
        here.sort(key=lambda row: list(dict.fromkeys(found["case"] for found in rows)).index(row["case"]))
        print(f"\n## steps\n\n{caption(here)}\n")
        print("\n".join(lines(here)))
        if any(row.get("parts") for row in here):
            print(f"\n## breakdown of a step\n\n{caption(here)}\n")
            print("\n".join(breakdown_lines(here)))
        if len(gaps := list(gap_lines(here))) > 2:
            print("\n## longest gaps\n\n" + "\n".join(gaps))
        if path := draw(here, out, caption(here)):
            print(f"\nwrote {path}")
        if options.targets:
            print(f"\n## targets, {hardware}\n")
            print("\n".join(target_lines(here)))


if __name__ == "__main__":
    main(sys.argv[1:])
