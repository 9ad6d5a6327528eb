"""The pictures of a search, and of a learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.tune import records
from engine.tune.records import Status, Trial

HISTORY_FILE = "history.png"
VALUES_FILE = "values.png"
CURVES_FILE = "curves.png"
FILES = (HISTORY_FILE, VALUES_FILE, CURVES_FILE)
COLOURS = {"coarse": "tab:blue", "fine": "tab:orange", "final": "tab:green", "grid": "tab:blue"}


def draw(root: Path, trials: Sequence[Trial], metric: str, direction: str) -> list[str]:
    """Results by run, results by value of each option, and the metric over steps; the files' names."""
    done = [trial for trial in trials if trial.status is Status.done and trial.value is not None]
    _history(root / HISTORY_FILE, trials, done, metric, direction)
    _values(root / VALUES_FILE, done, metric)
    _curves(root, trials, metric)
    return [HISTORY_FILE, VALUES_FILE, CURVES_FILE]


def scale(texts: Sequence[str]) -> tuple[list[float] | None, bool]:
    """The values as numbers, None where some is none, and whether they span so much that ratios count."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None, False
    return numbers, min(numbers) > 0 and max(numbers) >= 10 * min(numbers)


def _figure(count: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8, 4.5 * count), 4.5), dpi=120, layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        one.grid(visible=True, alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(path))


def _history(path: Path, trials: Sequence[Trial], done: Sequence[Trial], metric: str, direction: str) -> None:
    figure, (axes,) = _figure()
    better = max if direction == "maximize" else min
    for phase in dict.fromkeys(trial.phase for trial in done):
        runs = [trial for trial in done if trial.phase == phase]
        numbers, results = [run.number for run in runs], [run.value or 0.0 for run in runs]
        axes.scatter(numbers, results, color=COLOURS[phase], label=phase)
        best = [better(results[: end + 1]) for end in range(len(results))]
        axes.step(numbers, best, color=COLOURS[phase], alpha=0.6, where="post")
    pruned = [trial for trial in trials if trial.status is Status.pruned and trial.value is not None]
    axes.scatter(
        [run.number for run in pruned], [run.value for run in pruned], marker="x", color="gray", label="pruned"
    )
    axes.set(title="results, and the best so far", xlabel="run", ylabel=metric)
    axes.legend(frameon=False)
    _save(figure, path)


def _values(path: Path, done: Sequence[Trial], metric: str) -> None:
    options = list(done[0].values)
    figure, every = _figure(len(options))
    for axes, option in zip(every, options, strict=True):
        numbers, log = scale([trial.values[option] for trial in done])
        for phase in dict.fromkeys(trial.phase for trial in done):
            runs = [trial for trial in done if trial.phase == phase]
            places = [run.values[option] if numbers is None else float(run.values[option]) for run in runs]
            axes.scatter(places, [run.value for run in runs], color=COLOURS[phase], label=phase)
        if log:
            axes.set_xscale("log")
        axes.set(xlabel=option, ylabel=metric)
    every[0].legend(frameon=False)
    _save(figure, path)


def _curves(root: Path, trials: Sequence[Trial], metric: str) -> None:
    figure, (axes,) = _figure()
    for trial in trials:
        points = [point for point in records.metric_points(root / str(trial.number), metric) if math.isfinite(point[1])]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=COLOURS[trial.phase], alpha=0.6, marker=".", linewidth=1)
    axes.set(title="all runs", xlabel="step", ylabel=metric)
    _save(figure, root / CURVES_FILE)


def range_test(
    path: Path, rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], lr: float
) -> None:
    """Loss over learning rate, with the suggested rate marked."""
    figure, (axes,) = _figure()
    axes.plot(rates, losses, color="tab:blue", alpha=0.3, label="training")
    axes.plot(rates, smoothed, color="tab:blue", label="smoothed")
    axes.axvline(lr, color="tab:orange", label=f"suggested {lr:.2e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per token)", title="learning-rate range test")
    top = losses[0]
    axes.set_ylim(min(smoothed) - 0.05 * (top - min(smoothed)), top + 0.3 * (top - min(smoothed)))
    axes.legend(frameon=False)
    _save(figure, path)
