"""Loss curves and how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LEAST = 1e-9
"""Equal losses have a place on a logarithmic axis too."""


def draw(path: Path, title: str, curves: Mapping[str, Sequence[float]], limit: float) -> None:
    """Losses (nats) above, absolute differences below, as a PNG.

    Args:
        curves: one loss for each step, of `octant`, `transformers` and `transformers in fp64`.
        limit: largest difference allowed between the first two, nats.
    """
    ours, theirs, exact = curves["octant"], curves["transformers"], curves["transformers in fp64"]
    figure = Figure(figsize=(8, 6.5), dpi=150, layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, len(ours) + 1)
    top.plot(steps, theirs, color="tab:orange", linewidth=3, alpha=0.6, label="transformers")
    top.plot(steps, ours, color="tab:blue", linewidth=1, label="Octant")
    top.set(title=f"{title}: pretraining in fp32", ylabel="loss (nats)")
    for one, other, color, label in (
        (ours, theirs, "tab:blue", "Octant and transformers"),
        (ours, exact, "tab:green", "Octant and transformers in fp64"),
        (theirs, exact, "tab:gray", "transformers in fp32 and fp64"),
    ):
        apart = [max(_LEAST, abs(a - b)) for a, b in zip(one, other, strict=True)]
        below.plot(steps, apart, color=color, linewidth=1, label=f"{label} (worst {max(apart):.1e})")
    below.axhline(limit, color="tab:red", linewidth=1, linestyle="--", label=f"limit {limit:.0e}")
    below.set(xlabel="step", ylabel="difference (nats)", yscale="log")
    for axes in (top, below):
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))
