"""The search for the largest size that fits, on devices that are made up."""

from __future__ import annotations

import math
import random

import pytest

from engine.tune.largest import GUESSES, Attempt, search

SIZES = [1, *(step << power for power in range(9) for step in (2, 3))]


class Device:
    """Takes `base` bytes and `slope` for each of a size; what is above its budget fails, with or without a peak."""

    def __init__(self, base: float, slope: float, budget: float, *, peaks_of_failures: bool = False) -> None:
        self.base, self.slope, self.budget, self.tells = base, slope, budget, peaks_of_failures
        self.tried: list[int] = []

    def attempt(self, size: int) -> Attempt:
        self.tried.append(size)
        peak = round(self.base + self.slope * size)
        fits = peak <= self.budget
        told = peak if fits or self.tells else None
        return Attempt(size=size, fits=fits, peak_bytes=told, reason="" if fits else "no", seconds=0.0)

    def largest(self, sizes: list[int]) -> int | None:
        return max((size for size in sizes if round(self.base + self.slope * size) <= self.budget), default=None)


def best(made: list[Attempt]) -> int | None:
    return max((one.size for one in made if one.fits), default=None)


@pytest.mark.parametrize("seed", range(300))
def test_it_is_always_the_largest_that_fits_with_few_trials(seed: int) -> None:
    draw = random.Random(seed)
    sizes = sorted(draw.sample(range(1, 600), draw.randint(1, 20)))
    base, slope = draw.uniform(0, 1e9), draw.uniform(1e5, 1e8)
    device = Device(base, slope, base + slope * draw.uniform(0, 700), peaks_of_failures=draw.random() < 0.5)
    wrong = draw.choice([0.0, 0.3, 1.0, 5.0])
    made = search(sizes, lambda size: round(wrong * (base + slope * size)), round(device.budget), device.attempt)
    assert best(made) == device.largest(sizes)
    assert len(made) == len(set(device.tried)) <= GUESSES + 1 + math.ceil(math.log2(len(sizes) + 1))


@pytest.mark.parametrize("seed", range(50))
def test_peaks_that_do_not_grow_evenly_mislead_nobody(seed: int) -> None:
    draw = random.Random(seed)
    edge = draw.choice([0, *SIZES])

    def attempt(size: int) -> Attempt:
        fits = size <= edge
        return Attempt(size=size, fits=fits, peak_bytes=draw.randint(0, 100) if fits else None, reason="", seconds=0.0)

    made = search(SIZES, lambda size: draw.randint(0, 100), 50, attempt)
    assert best(made) == (edge or None)
    assert len(made) <= GUESSES + 1 + math.ceil(math.log2(len(SIZES) + 1))


def test_a_good_plan_takes_two_trials_and_proves_that_the_next_size_fails() -> None:
    device = Device(50e9, 4e9, 140e9)
    made = search(SIZES, lambda size: round(50e9 + 4e9 * size), 140_000_000_000, device.attempt)
    assert device.tried == [16, 24]
    assert [one.fits for one in made] == [True, False]


def test_a_plan_that_promises_too_much_is_mended_by_what_was_measured() -> None:
    device = Device(50e9, 4e9, 140e9)
    made = search(SIZES, lambda size: round(10e9 + 1e9 * size), 140_000_000_000, device.attempt)
    assert best(made) == 16
    assert len(device.tried) <= 6


def test_without_a_budget_the_largest_comes_first() -> None:
    device = Device(0, 1, 1e12)
    search(SIZES, lambda size: size, None, device.attempt)
    assert device.tried == [SIZES[-1]]


def test_all_sizes_too_large_ends_at_the_smallest() -> None:
    device = Device(10, 1, 5)
    made = search([1, 2, 3], lambda size: 0, 5, device.attempt)
    assert best(made) is None
    assert device.tried[-1] == 1
