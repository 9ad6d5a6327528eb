from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.errors import DataError
from engine.observe.plot import plot_losses, read_losses, smooth


def metrics(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smooth([4.0] * 5, span=10) == pytest.approx([4.0] * 5)
    assert smooth([8.0, 2.0, 3.0], span=10) == [8.0, 2.0, 3.0]


def test_smoothing_is_an_exponential_average_with_a_memory_that_grows() -> None:
    # The 20th value is the first to weigh 1 / 2; from the 40th on a span of 4 holds the weight at 1 / 4.
    assert smooth([*[0.0] * 19, 8.0], span=4)[-1] == pytest.approx(4.0)
    assert smooth([*[0.0] * 39, 8.0, 8.0], span=4)[-2:] == pytest.approx([2.0, 3.5])


def test_smoothing_steps_over_values_that_are_not_finite() -> None:
    result = smooth([math.nan, 2.0, math.inf, 2.0], span=3)
    assert math.isnan(result[0])
    assert result[1:] == pytest.approx([2.0] * 3)


def test_points_of_both_curves(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": "nan", "val_loss": 2.5}]
    rows.append({"step": 3, "val_loss": 2.0})
    train, validation = read_losses(metrics(tmp_path, rows))
    assert train[0] == (1.0, 3.0)
    assert train[1][0] == 2.0
    assert math.isnan(train[1][1])
    assert validation == [(2.0, 2.5), (3.0, 2.0)]


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "[1, 2]", '{"step": 2, "loss": null}'])
def test_a_line_cut_by_a_crash_is_ignored_only_at_the_end(tail: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 3.0}]
    path = metrics(tmp_path, rows, tail=tail)
    assert read_losses(path)[0] == [(1.0, 3.0)]
    path.write_text(tail + "\n" + '{"step": 3, "loss": 1.0}\n')
    with pytest.raises(DataError) as caught:
        read_losses(path)
    message = str(caught.value)
    assert "OCT491" in message
    assert f"logging.plot={path}" in message
    assert "line 1 of 2" in message
    assert "logging.plot=false" in message


@pytest.mark.parametrize(
    ("rows", "rule"),
    [([], "none of its 0 lines holds a loss"), ([{"step": 1, "lr": 0.1}], "none of its 1 lines holds a loss")],
)
def test_nothing_to_draw_is_refused(rows: list[dict[str, Any]], rule: str, tmp_path: Path) -> None:
    path = metrics(tmp_path, rows)
    with pytest.raises(DataError) as caught:
        plot_losses(path, tmp_path / "loss.png", "tiny")
    message = str(caught.value)
    assert "OCT490" in message
    assert f"logging.plot={path}" in message
    assert rule in message
    assert "Train at least one step" in message
    assert not (tmp_path / "loss.png").exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: No such file.*logging\.plot=false"):
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "tiny")


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 3.0}],
        [{"step": 1, "val_loss": 3.0}],
        [{"step": 1, "loss": "nan"}],
        [{"step": step, "loss": 10 / step, "val_loss": 11 / step} for step in range(1, 60)],
    ],
    ids=["one line", "validation only", "not finite", "long"],
)
def test_whatever_there_is_gets_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_losses(metrics(tmp_path, rows), tmp_path / "loss.png", "tiny")
    assert size_of_png(tmp_path / "loss.png") == (1200, 675)


def test_the_curve_changes_the_picture(tmp_path: Path) -> None:
    pictures = []
    for slope in (1.0, 2.0):
        rows = [{"step": step, "loss": 5 - slope * math.log(step)} for step in range(1, 5)]
        plot_losses(metrics(tmp_path, rows), tmp_path / "loss.png", "tiny")
        pictures.append((tmp_path / "loss.png").read_bytes())
    assert pictures[0] != pictures[1]
