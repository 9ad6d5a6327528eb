from __future__ import annotations

import io
import math
import os
import sys

import pytest

from engine.observe import log
from engine.observe.progress import Progress, describe, human_count, human_time


@pytest.fixture(autouse=True)
def main_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_rank", 0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7.25, "7.25"), (999.4, "999"), (999.6, "1k"), (12_345, "12.3k"), (1_234_567, "1.23M"), (5e9, "5G")],
)
def test_human_count(value: float, text: str) -> None:
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-3, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (125, "2m 05s"),
        (3725, "1h 02m"),
        (86400 * 3 + 3600 * 4, "3d 04h"),
        (math.inf, "unknown"),
    ],
)
def test_human_time(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


def test_known_metrics_in_a_fixed_order_and_absent_ones_left_out() -> None:
    metrics = {"time_left_s": 3725, "lr": 3e-4, "loss": 3.42171, "tokens_per_s": 12_345, "mfu": 0.4123, "other": 1}
    assert describe(metrics) == ["loss 3.4217", "12.3k tok/s", "MFU 41.2%", "lr 3.00e-04", "1h 02m left"]
    assert describe({"grad_norm": 0.8249, "val_loss": math.nan}) == ["val loss nan", "grad norm 0.825"]


def shown_steps(capsys: pytest.CaptureFixture[str]) -> list[int]:
    out, err = capsys.readouterr()
    assert err == ""
    return [int(line.split()[1].split("/")[0]) for line in out.splitlines()]


def test_a_plain_line_tells_step_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10)
    progress.update(1, {"loss": 2.5, "grad_norm": 1.0})
    assert capsys.readouterr().out == "step 1/10 | loss 2.5000 | grad norm 1\n"


def test_lines_are_every_steps_apart(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(10, every=3, clock=clock)
    for step in range(1, 11):
        clock.now += 60
        progress.update(step, {"loss": 1.0})
    progress.close()
    assert shown_steps(capsys) == [1, 4, 7, 10]


def test_lines_are_seconds_apart_but_first_and_last_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(12, clock=clock)
    for step in range(1, 13):
        progress.update(step, {"loss": 1.0})
        clock.now += 1
    progress.close()
    assert shown_steps(capsys) == [1, 6, 11, 12]


def test_the_last_step_of_a_stopped_run_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(100, clock=Clock())
    progress.update(1, {})
    progress.update(2, {})
    progress.close()
    progress.close()
    assert shown_steps(capsys) == [1, 2]


def test_close_without_a_step_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(5).close()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_disabled_shows_nothing(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress(5, enabled=False)
    progress.update(1, {"loss": 1.0})
    progress.update(5, {"loss": 1.0})
    progress.close()
    assert (screen.getvalue(), capsys.readouterr().out) == ("", "")


def test_a_terminal_gets_a_bar_and_no_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress(4, start=1)
    for step in (2, 3, 4):
        progress.update(step, {"loss": 1.5, "tokens_per_s": 12_345})
    progress.close()
    last = screen.getvalue().split("\r")[-1]
    assert "100%" in last
    assert "4/4, loss 1.5000, 12.3k tok/s" in last
    assert capsys.readouterr().out == ""


def test_a_terminal_without_width_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, terminal = os.openpty()
    with os.fdopen(main, "rb"), os.fdopen(terminal, "w") as screen:
        assert screen.isatty()
        monkeypatch.setattr(sys, "stderr", screen)
        Progress(4).update(1, {"loss": 1.5})
        assert capsys.readouterr().out == "step 1/4 | loss 1.5000\n"
