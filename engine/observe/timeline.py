"""Pipeline timelines as a picture: which stage computes what, and when nobody does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import DataError
from engine.topology.program import COMPUTE, OpKind
from engine.topology.timeline import Event, Timeline

WIDTH_IN = 12.0
LANE_IN = 0.32
PANEL_IN = 0.75
"""Height of a panel's title and axis."""
FONT_PT = 7.0

Colour = tuple[float, float, float]

_ENDS: dict[OpKind, tuple[Colour, Colour]] = {
    OpKind.forward: ((0.68, 0.82, 0.93), (0.05, 0.33, 0.62)),
    OpKind.backward: ((0.99, 0.80, 0.58), (0.80, 0.33, 0.02)),
}
"""Colours of a stage's first and last chunk."""


def draw_timeline(path: Path, rows: Sequence[tuple[str, Timeline]], title: str) -> None:
    """Draw timelines below each other on one time axis, for example a predicted and a measured one.

    One panel per row, titled with the row's name, its length and idle share; one lane per stage, stage 0 on top.
    Forward passes are blue and backward passes orange, darker for a stage's later chunks, with the micro-batch's number
    where it fits. The same timelines give the same file.

    Args:
        path: Ends in .png or .svg.
        rows: Names and timelines, in seconds.
        title: Of the whole picture.

    Raises:
        DataError: 492 another suffix, or no rows.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix not in (".png", ".svg"):
        rule, way_out = f"the suffix '{path.suffix}' is neither .png nor .svg", f"Use {path.with_suffix('.svg')}"
        raise DataError.of(492, "timeline", str(path), rule, way_out)
    if not rows:
        raise DataError.of(492, "timeline", str(path), "0 timelines, a picture needs at least 1", "Give one timeline")
    lanes = [len(timeline.events) for _, timeline in rows]
    heights = [PANEL_IN + LANE_IN * count for count in lanes]
    longest = max(timeline.makespan for _, timeline in rows)
    parts = max(len(_chunks(events)) for _, timeline in rows for events in timeline.events)
    # Text stays text and nothing in the file depends on the day or on chance.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "octant", "font.size": FONT_PT + 1}):
        figure = Figure(figsize=(WIDTH_IN, 0.7 + sum(heights)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(rows), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, timeline) in zip(panels, rows, strict=True):
            _draw_panel(axes, timeline, longest, parts)
            axes.set_title(f"{name}: {timeline.makespan:.4g} s, idle {timeline.bubble:.1%}", loc="left")
        panels[-1].set_xlabel("seconds")
        figure.suptitle(title)
        _draw_legend(figure, parts)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_panel(axes: Any, timeline: Timeline, longest: float, parts: int) -> None:
    points_per_second = 0.93 * WIDTH_IN * 72 / longest if longest else 0.0
    for lane, events in enumerate(timeline.events):
        passes = [event for event in events if event.op.kind in COMPUTE]
        chunks = _chunks(events)
        colours = [_shade(event.op.kind, chunks.index(event.op.chunk), parts) for event in passes]
        spans = [(event.start, event.end - event.start) for event in passes]
        axes.broken_barh(spans, (lane - 0.42, 0.84), facecolors=colours, edgecolors="white", linewidth=0.4)
        for event, colour in zip(passes, colours, strict=True):
            label = str(event.op.micro_batch)
            if (event.end - event.start) * points_per_second > FONT_PT * (0.65 * len(label) + 0.3):
                middle = (event.start + event.end) / 2
                ink = "black" if sum(colour) > 1.6 else "white"
                axes.text(middle, lane, label, ha="center", va="center_baseline", fontsize=FONT_PT, color=ink)
    count = len(timeline.events)
    axes.set(xlim=(0, longest or 1.0), ylim=(count - 0.5, -0.5), facecolor="0.95")
    axes.set_yticks(range(count), [f"stage {lane}" for lane in range(count)])
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_legend(figure: Any, parts: int) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=_shade(kind, part, parts), label=f"{kind}, chunk {part + 1}" if parts > 1 else kind.value)
        for kind in COMPUTE
        for part in range(parts)
    ]
    patches.append(Patch(facecolor="0.95", edgecolor="0.7", label="idle"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)


def _chunks(events: Sequence[Event]) -> list[int]:
    """Chunks of a stage, in the order of the model."""
    return sorted({event.op.chunk for event in events if event.op.kind in COMPUTE})


def _shade(kind: OpKind, part: int, parts: int) -> Colour:
    first, last = _ENDS[kind]
    weight = part / (parts - 1) if parts > 1 else 0.3
    red, green, blue = (a + (b - a) * weight for a, b in zip(first, last, strict=True))
    return red, green, blue
