"""Two loss curves and how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LEAST = 1e-9
"""Equal losses have a place on a logarithmic axis too."""


def draw(
    path: Path, title: str, ours: Sequence[float], theirs: Sequence[float], floor: Sequence[float], limit: float
) -> None:
    """Losses (nats) above, absolute differences below, as a PNG.

    Args:
        floor: losses of transformers trained again, differing in rounding alone.
        limit: largest difference allowed, nats.
    """
    figure = Figure(figsize=(8, 6.5), dpi=150, layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, len(ours) + 1)
    top.plot(steps, theirs, color="tab:orange", linewidth=3, alpha=0.6, label="transformers, one process")
    top.plot(steps, ours, color="tab:blue", linewidth=1, label="Octant, PP2 x TP2 x DP2")
    top.set(title=f"{title}: pretraining in fp32", ylabel="loss (nats)")
    for other, color, label in ((ours, "tab:blue", "Octant"), (floor, "tab:gray", "transformers, other rounding")):
        apart = [max(_LEAST, abs(a - b)) for a, b in zip(other, theirs, strict=True)]
        below.plot(steps, apart, color=color, linewidth=1, label=f"{label} (worst {max(apart):.1e})")
    below.axhline(limit, color="tab:red", linewidth=1, linestyle="--", label=f"limit {limit:.0e}")
    below.set(xlabel="step", ylabel="difference from transformers (nats)", yscale="log")
    for axes in (top, below):
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
