"""The progress of training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

from engine.observe.log import say

MIN_INTERVAL_S = 5.0
"""Shortest time between two plain lines."""

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


def human_count(value: float) -> str:
    """Three digits and a unit: 12345 -> "12.3k"."""
    if not math.isfinite(value):
        return str(value)
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def human_time(seconds: float) -> str:
    """The two leading units: 3725 -> "1h 02m", 45 -> "45s"."""
    if not math.isfinite(seconds):
        return "unknown"
    total = max(0, round(seconds))
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if total >= size:
            return f"{total // size}{unit} {total % size // part:02d}{part_unit}"
    return f"{total}s"


_FIELDS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda value: f"loss {value:.4f}"),
    ("val_loss", lambda value: f"val loss {value:.4f}"),
    ("tokens_per_s", lambda value: f"{human_count(value)} tok/s"),
    ("mfu", lambda value: f"MFU {100 * value:.1f}%"),
    ("lr", lambda value: f"lr {value:.2e}"),
    ("grad_norm", lambda value: f"grad norm {value:.3g}"),
    ("time_left_s", lambda value: f"{human_time(value)} left"),
)


def describe(metrics: Mapping[str, float]) -> list[str]:
    """The known metrics as short texts, in a fixed order; absent and unknown ones are left out.

    Known: `loss` and `val_loss` in nats per token, `tokens_per_s` over all ranks, `mfu` from 0 to 1, `lr`,
    `grad_norm`, `time_left_s` in seconds.
    """
    return [show(metrics[name]) for name, show in _FIELDS if name in metrics]


def _can_draw(stream: TextIO) -> bool:
    """Whether a bar can be drawn. Terminals of containers often claim a width of 0, where tqdm draws blanks."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return True


class Progress:
    """Shows steps as they finish. A bar on stderr when that is a terminal, otherwise lines on stdout.

    The first and the last step always get a line; between them lines are `every` steps and 5 seconds apart.
    """

    def __init__(
        self,
        total: int,
        *,
        every: int = 1,
        enabled: bool = True,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the display.

        Args:
            total: number of the last step.
            every: fewest steps between two plain lines.
            enabled: False shows nothing (ranks other than 0, or `logging.progress=false`).
            start: steps done before, when a run goes on.
            clock: seconds, monotonic.
        """
        self._total, self._every = total, every
        self._clock = clock
        self._shown_step: int | None = None
        self._shown_at = 0.0
        self._latest: tuple[int, Mapping[str, float]] | None = None
        self._bar = None
        self._enabled = enabled
        if enabled and _can_draw(sys.stderr):
            self._bar = tqdm(total=total, initial=start, bar_format=_BAR, dynamic_ncols=True, file=sys.stderr)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` (1 is the first) is done, with these metrics (see `describe`)."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(describe(metrics)), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._latest = (step, metrics)
        if self._due(step):
            self._line()

    def close(self) -> None:
        """Show the last step if it has not been shown, and leave the bar behind."""
        if self._bar is not None:
            self._bar.close()
        elif self._latest is not None and self._latest[0] != self._shown_step:
            self._line()

    def _due(self, step: int) -> bool:
        if self._shown_step is None or step >= self._total:
            return True
        return step - self._shown_step >= self._every and self._clock() - self._shown_at >= MIN_INTERVAL_S

    def _line(self) -> None:
        if self._latest is not None:
            step, metrics = self._latest
            say(" | ".join([f"step {step}/{self._total}", *describe(metrics)]))
            self._shown_step, self._shown_at = step, self._clock()
