"""One page of plots about a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.report.sample_view import Sample
from engine.data.report.statistics import Part

_COLUMNS = 64
"""Positions in a line of the picture of a row."""
_COLOURS = 10


def draw_corpus(path: Path, report: dict[str, Any], parts: Sequence[Part], row: Sample) -> None:
    """Draw document lengths, token frequencies, shares of positions, sources and one row into the PNG `path`.

    `report`: of `engine.data.report.inspect`, with its `batch`. Random tokens have no documents: their plots stay
    empty. Raises OSError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 3)
    _lengths(figure.add_subplot(grid[0, 0]), report, parts)
    _ranks(figure.add_subplot(grid[0, 1]), report)
    _shares(figure.add_subplot(grid[0, 2]), report["batch"])
    _sources(figure.add_subplot(grid[1, 0]), report["sources"])
    _row(figure.add_subplot(grid[1, 1:]), row)
    figure.suptitle(f"{report['split']} for {report['model']}, seq_len {report['seq_len']}")
    FigureCanvasAgg(figure).print_png(str(path))


def length_bins(lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Borders of at most 41 bins, equally wide in the logarithm, that hold all lengths; empty documents count as 1."""
    top = max(int(lengths.max()), 1)
    return np.unique(np.geomspace(1, top + 1, 41).astype(np.int64))


def _lengths(axes: Any, report: dict[str, Any], parts: Sequence[Part]) -> None:
    axes.set(title="documents by length", xlabel="tokens", ylabel="documents")
    if not parts:
        return
    lengths = np.concatenate([part.lengths for part in parts])
    axes.hist(np.maximum(lengths, 1), bins=length_bins(lengths), color="tab:blue")
    axes.axvline(report["seq_len"], color="tab:red", linewidth=1, label=f"seq_len {report['seq_len']}")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=10)
    axes.legend(frameon=False)


def _ranks(axes: Any, report: dict[str, Any]) -> None:
    axes.set(title="tokens by rank", xlabel="rank", ylabel="occurrences")
    if "token_use" in report:
        counts = report["token_use"]["by_rank"]
        axes.loglog(np.arange(1, len(counts) + 1), counts, color="tab:blue", label="this split")
        axes.loglog([1, len(counts)], [counts[0], counts[0] / len(counts)], "--", color="tab:gray", label="1 / rank")
        axes.legend(frameon=False)


def _shares(axes: Any, batch: dict[str, Any]) -> None:
    names = ("predicted", "context", "padding")
    bars = axes.bar(names, [batch[name] for name in names], color=["tab:green", "tab:blue", "tab:gray"])
    axes.bar_label(bars, [f"{batch[name]:.1%}" for name in names])
    axes.set(title=f"positions of {batch['samples']} samples", ylabel="share", ylim=(0, 1.1))


def _sources(axes: Any, sources: Sequence[dict[str, Any]]) -> None:
    axes.set(title="sources", xlabel="share")
    if not sources:
        return
    places, total = np.arange(len(sources)), sum(source["tokens"] for source in sources)
    axes.barh(places - 0.2, [source["tokens"] / total for source in sources], height=0.4, label="of the tokens")
    axes.barh(places + 0.2, [source["share"] for source in sources], height=0.4, label="of the samples")
    axes.set_yticks(places, [_short(source["source"]) for source in sources])
    axes.set(xlim=(0, 1), ylim=(-0.7, max(len(sources), 3) - 0.3))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-21:]}"


def row_picture(row: Sample) -> np.ndarray[Any, Any]:
    """Number of the document at each position, from 0 on, in lines of 64; NaN: padding. float64 (lines, 64)."""
    documents = np.cumsum(row.borders).astype(np.float64) - float(row.borders[0])
    documents[row.length :] = np.nan
    lines = -(-len(documents) // _COLUMNS)
    picture = np.full(lines * _COLUMNS, np.nan)
    picture[: len(documents)] = documents
    return picture.reshape(lines, _COLUMNS)


def _row(axes: Any, row: Sample) -> None:
    from matplotlib import colormaps

    picture = row_picture(row)
    axes.imshow(picture % _COLOURS, cmap=colormaps["tab10"], vmin=-0.5, vmax=_COLOURS - 0.5, aspect="auto",
                interpolation="nearest")  # fmt: skip
    documents = int(np.nanmax(picture)) + 1
    axes.set(title=f"sample {row.number}: colours are its {documents} documents, white is padding", xlabel="position")
    axes.set_yticks(np.arange(len(picture)), [str(n * _COLUMNS) for n in range(len(picture))])
    if len(picture) > 16:
        axes.locator_params(axis="y", nbins=8)
