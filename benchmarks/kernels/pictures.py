"""Curves of attention over the sequence length, and bars of the other suites, as PNG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.kernels.results import Row, figures

# Okabe and Ito's colours, which people with colour blindness can tell apart; with a marker each for print in grey.
STYLES = {
    "triton": ("#D55E00", "o"),
    "sdpa_cudnn": ("#0072B2", "s"),
    "flash_attn_4": ("#009E73", "^"),
    "sdpa_flash": ("#56B4E9", "v"),
    "flash_attn": ("#CC79A7", "D"),
    "flex": ("#E69F00", "P"),
    "triton tutorial": ("#000000", "X"),
    "sdpa": ("#999999", "*"),
    "octant triton": ("#D55E00", "o"),
    "torch.compile": ("#0072B2", "s"),
    "torch": ("#999999", "v"),
    "torch foreach": ("#999999", "v"),
    "torch fused + copies": ("#999999", "v"),
    "liger": ("#009E73", "^"),
    "copy": ("#000000", "D"),
}
_OTHER = ("#F0E442", "h")
PHASES = ("fwd", "bwd", "fwd+bwd")
_TITLES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward"}


def draw_all(rows: Sequence[Row], folder: Path, caption: str) -> Iterator[Path]:
    """Every picture that rows of one kind of hardware have figures for; yields where each was written."""
    prefix = re.sub(r"\W+", "_", rows[0]["hardware"].lower())
    for causal, name in ((True, "causal"), (False, "full")):
        found = [row for row in figures(rows, suite="attention", causal=causal) if "tflops" in row]
        found = [row for row in found if row["heads"] == row["kv_heads"]]
        if found:
            yield _curves(found, folder / f"{prefix}_attention_{name}.png", f"{name} attention\n{caption}")
    for suite, unit, label in (
        ("documents", "x", "speed over dense causal"),
        ("loss", "s", "ms"),
        ("loss", "GiB", "GiB beyond inputs and gradients"),
        ("elementwise", "ratio", "% of copy"),
        ("optimizer", "ratio", "% of copy"),
    ):
        found = [row for row in figures(rows, suite=suite, unit=unit) if "chosen" not in row]
        if suite == "elementwise":
            found = [row for row in found if not row["metric"].endswith("fwd+bwd")]
        if found:
            name = "loss_memory" if unit == "GiB" else suite
            yield _bars(found, folder / f"{prefix}_{name}.png", label, f"{suite}\n{caption}")


def _finish(figure: Figure, path: Path, caption: str) -> Path:
    title, _, rest = caption.partition("\n")
    figure.suptitle(title)
    # The layout leaves room for it.
    figure.supxlabel(fill(rest, 130), fontsize=7, color="#444444")
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _curves(rows: Sequence[Row], path: Path, caption: str) -> Path:
    """TFLOP/s over the sequence, one panel for each head dim and phase; bars from p20 to p80."""
    dims = sorted({row["head_dim"] for row in rows})
    figure = Figure(figsize=(13, 4.2 * len(dims) + 0.8), dpi=150, layout="constrained")
    panels = figure.subplots(len(dims), len(PHASES), squeeze=False, sharey="row")
    systems = sorted({row["system"] for row in rows}, key=_order)
    for dim, line in zip(dims, panels, strict=True):
        for phase, axes in zip(PHASES, line, strict=True):
            for system in systems:
                found = figures(rows, head_dim=dim, metric=phase, system=system)
                _curve(axes, sorted(found, key=lambda row: row["length"]), system)
            axes.set(title=f"head dim {dim}, {_TITLES[phase]}", xscale="log", xlabel="sequence length")
            ticks = sorted({row["length"] for row in rows})
            axes.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            _tidy(axes)
        line[0].set_ylabel("TFLOP/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return _finish(figure, path, caption)


def _curve(axes: Axes, found: Sequence[Row], system: str) -> None:
    color, marker = STYLES.get(system, _OTHER)
    rates = [row["tflops"] for row in found]
    spread = [
        [row["tflops"] - row["tflops"] * row["p50"] / row["p80"] for row in found],
        [row["tflops"] * row["p50"] / row["p20"] - row["tflops"] for row in found],
    ]
    lengths = [row["length"] for row in found]
    # A system without a figure here stays in the legend.
    axes.errorbar(lengths, rates, yerr=spread if found else None, color=color, marker=marker, capsize=2, label=system)


def _bars(rows: Sequence[Row], path: Path, label: str, caption: str) -> Path:
    """One group of bars for each case and metric, one bar for each system; thin lines from p20 to p80."""
    factor = {"s": 1e3, "ratio": 100.0}.get(rows[0]["unit"], 1.0)
    groups = list(dict.fromkeys((row["case"], row["metric"]) for row in rows))
    systems = sorted({row["system"] for row in rows}, key=_order)
    figure = Figure(figsize=(10, 1.6 + 0.18 * len(groups) * (len(systems) + 1)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, system in enumerate(systems):
        found = {(row["case"], row["metric"]): row for row in rows if row["system"] == system}
        places = [place for place, group in enumerate(groups) if group in found]
        values: dict[str, list[Any]] = {
            name: [found[groups[place]][name] * factor for place in places] for name in ("p20", "p50", "p80")
        }
        spread = [
            [max(0.0, mid - low) for mid, low in zip(values["p50"], values["p20"], strict=True)],
            [max(0.0, high - mid) for mid, high in zip(values["p50"], values["p80"], strict=True)],
        ]
        height = 0.8 / len(systems)
        at = [place - 0.4 + height * (number + 0.5) for place in places]
        bars = axes.barh(
            at, values["p50"], height * 0.9, xerr=spread, color=STYLES.get(system, _OTHER)[0], label=system
        )
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
    axes.set_yticks(range(len(groups)), [_group_name(*group) for group in groups], fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(label)
    if factor == 100.0:
        axes.axvline(100.0, color="#000000", linewidth=1, linestyle="--")
    _tidy(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return _finish(figure, path, caption)


def _group_name(case: str, metric: str) -> str:
    return f"{case}\n{metric.removeprefix('of copy: ')}"


def _order(system: str) -> tuple[int, str]:
    names = list(STYLES)
    return (names.index(system) if system in names else len(names), system)


def _tidy(axes: Axes) -> None:
    axes.grid(visible=True, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
