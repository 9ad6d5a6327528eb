"""The largest size that fits, by few trials: measured peaks say where to look next, bisection ends the search."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GUESSES = 4
"""Trials that follow peaks; later ones halve what is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """How one size was tried."""

    size: int
    fits: bool
    peak_bytes: int | None
    """Of the rank that took most; None where memory ran out."""
    reason: str
    """Why it does not fit; empty where it does."""
    seconds: float


def search(
    sizes: Sequence[int],
    expected: Callable[[int], int],
    budget: int | None,
    attempt: Callable[[int], Attempt],
) -> list[Attempt]:
    """All trials, in order; the largest size that fits is the largest that is among them and fits.

    Needs that a size fits where a larger one does. Makes at most `GUESSES` + log2(len(sizes)) + 1 trials.

    Args:
        sizes: candidates, ascending.
        expected: bytes that a size is expected to take.
        budget: bytes that there are; None: nobody knows.
        attempt: tries a size.
    """
    low, high = -1, len(sizes)
    made: list[Attempt] = []
    while high - low > 1:
        index = _next(sizes, expected, budget, made, low, high)
        made.append(attempt(sizes[index]))
        if made[-1].fits:
            low = index
        else:
            high = index
    return made


def _next(
    sizes: Sequence[int],
    expected: Callable[[int], int],
    budget: int | None,
    made: Sequence[Attempt],
    low: int,
    high: int,
) -> int:
    """Which size to try, between `low`, the largest that is known to fit, and `high`, the smallest that does not."""
    known = sorted((one.size, one.peak_bytes) for one in made if one.fits and one.peak_bytes is not None)
    if len(made) >= GUESSES:
        index = (low + high) // 2
    elif budget is None:
        index = high - 1
    elif known:
        index = bisect.bisect(sizes, _reach(known, sizes, expected, budget)) - 1
    elif made:
        # Nothing fits so far, and what ran out of memory has no peak: down, faster each time.
        index = high - 2 ** (len(made) - 1)
    else:
        index = bisect.bisect(sizes, budget, key=expected) - 1
    return min(max(index, low + 1), high - 1)


def _reach(
    known: Sequence[tuple[int, int]], sizes: Sequence[int], expected: Callable[[int], int], budget: int
) -> float:
    """The size at which peaks that grow evenly reach the budget, from the two largest measured, or one and the plan."""
    size, peak = known[-1]
    if len(known) > 1:
        before = known[-2]
        slope = (peak - before[1]) / (size - before[0])
    else:
        slope = (expected(sizes[-1]) - expected(sizes[0])) / max(1, sizes[-1] - sizes[0])
    return size + (budget - peak) / slope if slope > 0 else float(sizes[-1])
