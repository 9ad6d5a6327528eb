"""A warning (SIGUSR1) that comes before training listens is kept, where it would end the process: see `StopSignal`."""

from __future__ import annotations

import signal
from types import FrameType

received: int | None = None
"""The signal that has come so far."""


def keep() -> None:
    """Begin to keep warnings. Only the main thread can."""
    signal.signal(signal.SIGUSR1, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global received
    received = number
