"""Lines about how far a long piece of work is."""

from __future__ import annotations

import time
from collections.abc import Callable

_EVERY_S = 5.0


class Progress:
    """Says how many of `total` bytes are done, how fast and how long it will take, every few seconds and at the end."""

    def __init__(
        self, say: Callable[[str], None], label: str, total: int, workers: int, every_s: float = _EVERY_S
    ) -> None:
        self.done = 0
        self._say, self._label, self._total, self._workers, self._every_s = say, label, total, workers, every_s
        self._started = self._said = time.monotonic()

    def add(self, size: int) -> None:
        """`size` more bytes are done."""
        self.done += size
        now = time.monotonic()
        if now - self._said >= self._every_s:
            self._said = now
            rate = self.done / (now - self._started)
            left = f"{max(self._total - self.done, 0) / rate:.0f} s left, " if rate else ""
            self._line(f"{left}{self._workers} worker{'s' * (self._workers != 1)}", rate)

    def end(self, remark: str = "") -> None:
        """All is done."""
        took = max(time.monotonic() - self._started, 1e-9)
        self._line(f"{took:.1f} s" + (f", {remark}" if remark else ""), self.done / took)

    def _line(self, rest: str, rate: float) -> None:
        amount = f"{self.done / 1e6:.1f} of {self._total / 1e6:.1f} MB"
        self._say(f"data: {self._label}, {amount}, {rate / 1e6:.1f} MB/s, {rest}")
