"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from engine.errors import DataError, EngineError

SMOOTH_FROM = 20
"""Fewest training points that get a smoothed line."""

Points = list[tuple[float, float]]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, but never over more than a tenth of those seen so far.

    The shorter memory at the start keeps the average on the curve while the loss falls fast. Values that are not
    finite repeat the average so far (nan before the first finite one).
    """
    average, seen, result = math.nan, 0, []
    for value in values:
        if math.isfinite(value):
            seen += 1
            average = value if seen == 1 else average + (value - average) / max(1.0, min(span, seen / 10))
        result.append(average)
    return result


def read_losses(metrics_path: Path) -> tuple[Points, Points]:
    """`(step, loss)` and `(step, val_loss)` points of a metrics.jsonl. A last line cut short by a crash is ignored.

    Raises:
        DataError: the file is missing, damaged, or holds no loss at all.
    """
    try:
        lines = metrics_path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise _no_losses(metrics_path, f"the file cannot be read: {error.strerror}") from error
    train: Points = []
    validation: Points = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise TypeError(f"not an object: {line}")
            for name, points in (("loss", train), ("val_loss", validation)):
                if name in row:
                    points.append((float(row["step"]), float(row[name])))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and number > 1:
                break
            raise DataError.of(
                491,
                "logging.plot",
                str(metrics_path),
                f"line {number} of {len(lines)} is not an object with a step and numbers",
                "Remove that line, or skip the picture with logging.plot=false",
            ) from error
    if not train and not validation:
        raise _no_losses(metrics_path, f"none of its {len(lines)} lines holds a loss, and a curve needs at least 1")
    return train, validation


def plot_losses(metrics_path: Path, png_path: Path, title: str) -> None:
    """Draw training and validation loss over steps into `png_path`.

    Args:
        metrics_path: JSONL with `step`, and `loss` or `val_loss` in nats per token.

    Raises:
        DataError: see `read_losses`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, validation = read_losses(metrics_path)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        smoothed = len(train) >= SMOOTH_FROM
        style = {"alpha": 0.3} if smoothed else {"marker": "o", "markersize": 4}
        axes.plot(steps, losses, color="tab:blue", linewidth=1, label="training", **style)
        if smoothed:
            average = smooth(losses, span=len(losses) / 50)
            axes.plot(steps, average, color="tab:blue", linewidth=1.8, label="training, smoothed")
    if validation:
        steps, losses = zip(*validation, strict=True)
        label = f"validation (last {losses[-1]:.4f})"
        axes.plot(steps, losses, color="tab:orange", marker="o", markersize=4, linewidth=1.2, label=label)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.locator_params(axis="x", integer=True)
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(png_path))


def _no_losses(path: Path, rule: str) -> EngineError:
    return DataError.of(
        490, "logging.plot", str(path), rule, "Train at least one step, or skip the picture with logging.plot=false"
    )
