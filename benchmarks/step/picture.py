"""Rates of all systems and where their steps go, as a PNG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.step.breakdown import PARTS
from benchmarks.step.results import Row
from benchmarks.step.systems import ONE_RANK, SYSTEMS

_TIMED = [name for name in SYSTEMS if name != ONE_RANK]
# Okabe and Ito's colours, which people with colour blindness can tell apart.
_SYSTEM = dict(
    zip(_TIMED, ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#000000", "#999999"), strict=True)
)
_PART = dict(zip(PARTS, ("#0072B2", "#009E73", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#DDDDDD"), strict=True))
_ROW = 0.24
"""Inches of a bar."""


def draw(rows: Sequence[Row], folder: Path, caption: str) -> Path | None:
    """Bars of tokens/s per GPU and, where steps were profiled, of the shares of a step. None: no step was measured.

    Args:
        rows: of one kind of hardware.
    """
    steps = [row for row in rows if row["metric"] == "step" and row["system"] in _SYSTEM]
    profiled = [row for row in rows if row["metric"] == "breakdown" and row["parts"] and row["system"] in _SYSTEM]
    if not steps:
        return None
    panels = [found for found in (steps, profiled) if found]
    heights = [max(1.2, _ROW * len(found)) for found in panels]
    figure = Figure(figsize=(11, sum(heights) + 1.8), dpi=150, layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    _rates(grid[0][0], steps)
    if profiled:
        _shares(grid[1][0], profiled)
    figure.suptitle("training steps")
    figure.supxlabel(fill(caption, 150), fontsize=7, color="#444444")
    quick = "_quick" if rows[0]["quick"] else ""
    path = folder / f"{re.sub(r'[^a-z0-9]+', '_', rows[0]['hardware'].lower())}_steps{quick}.png"
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _rates(axes: Axes, rows: Sequence[Row]) -> None:
    """As shares of the quickest system of the case: cases differ a hundredfold."""
    best = {row["case"]: max(r["tokens_per_s"] for r in rows if r["case"] == row["case"]) for row in rows}
    shares = [100 * row["tokens_per_s"] / best[row["case"]] for row in rows]
    spread = [
        [share - share * row["p50"] / row["p80"] for share, row in zip(shares, rows, strict=True)],
        [share * row["p50"] / row["p20"] - share for share, row in zip(shares, rows, strict=True)],
    ]
    bars = axes.barh(range(len(rows)), shares, 0.8, xerr=spread, color=[_SYSTEM[row["system"]] for row in rows])
    axes.bar_label(bars, [f"{row['tokens_per_s_per_gpu']:,.0f}" for row in rows], padding=3, fontsize=7)
    axes.set_title("tokens/s per GPU", fontsize=9)
    axes.set_xlabel("% of the quickest system of the case", fontsize=8)
    axes.set_xlim(0, 118)
    _finish(axes, rows)


def _shares(axes: Axes, rows: Sequence[Row]) -> None:
    left = [0.0] * len(rows)
    totals = [sum(row["parts"].values()) for row in rows]
    for part in PARTS:
        shares = [100 * row["parts"][part] / total for row, total in zip(rows, totals, strict=True)]
        axes.barh(range(len(rows)), shares, 0.8, left=left, color=_PART[part], label=part)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_title("where a profiled step of rank 0 goes", fontsize=9)
    axes.set_xlabel("% of the step", fontsize=8)
    axes.set_xlim(0, 100)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7)
    _finish(axes, rows)


def _finish(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [f"{row['case']}: {row['system']}" for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=True, axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
