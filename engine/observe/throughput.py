"""Tokens per second and time left, over a window of recent steps."""

from __future__ import annotations

from collections import deque

WINDOW_STEPS = 20
WARMUP_STEPS = 2


class StepTimer:
    """Speed over the last `WINDOW_STEPS` steps.

    The first `WARMUP_STEPS` steps (compilation, allocator, caches) count only while there are no others.
    """

    def __init__(self) -> None:
        self._warmup: list[tuple[float, int]] = []
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW_STEPS)

    def add(self, duration_s: float, tokens: int) -> None:
        """Record one step: its duration in seconds and the tokens it trained on, over all ranks."""
        steps = self._warmup if len(self._warmup) < WARMUP_STEPS else self._recent
        steps.append((duration_s, tokens))

    def tokens_per_s(self) -> float | None:
        """Tokens per second over all ranks; None before the first step."""
        duration, tokens, _ = self._totals()
        return tokens / duration if duration > 0 else None

    def step_s(self) -> float | None:
        """Mean duration of a step in seconds; None before the first step."""
        duration, _, steps = self._totals()
        return duration / steps if steps else None

    def time_left_s(self, steps_left: int) -> float | None:
        """Estimated seconds for `steps_left` more steps; None before the first step."""
        step = self.step_s()
        return None if step is None else step * max(0, steps_left)

    def _totals(self) -> tuple[float, int, int]:
        steps = self._recent or self._warmup
        return sum(duration for duration, _ in steps), sum(tokens for _, tokens in steps), len(steps)
