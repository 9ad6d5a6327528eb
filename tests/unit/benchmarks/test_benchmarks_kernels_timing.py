"""The clock of a GPU, on a device that only counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.kernels import timing
from benchmarks.kernels.timing import Budget, Timer

FLUSH_S = 100e-6


class Device:
    """A queue that is worked off at once, in seconds of its own; what waits for the host is none of its business."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.log.append(name)

        return call


class Buffer:
    def __init__(self, device: Device) -> None:
        self.zero_ = device.work("flush", FLUSH_S)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = device.now

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: device.log.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Buffer(device))
    return device


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The host's clock: as long as the list's number for each look at it."""
    clock, step = [0.0], [0.0]

    def look() -> float:
        clock[0] += step[0]
        return clock[0]

    monkeypatch.setattr(timing.time, "perf_counter", look)
    return step


def test_only_the_call_is_between_the_events_and_the_cache_is_cold(gpu: Device, instant: list[float]) -> None:
    timer = Timer(torch.device("cuda"), least=2, most=2)
    gpu.log.clear()
    times, _ = timer.rounds({"a": {"fwd": gpu.work("a", 2e-3)}, "b": {"fwd": gpu.work("b", 1e-3)}}, 0.0)
    assert times["a"]["fwd"] == pytest.approx([2e-3, 2e-3])
    assert times["b"]["fwd"] == pytest.approx([1e-3, 1e-3])
    plan = [*("wait", "a") * 2, "flush", "a", "wait"]
    assert gpu.log[: len(plan)] == plan
    # A whole round is queued before anybody waits.
    assert gpu.log[2 * len(plan) :] == [*("flush", "a", "flush", "b", "wait"), *("flush", "b", "flush", "a", "wait")]
    assert timer.repeats == {}


def test_short_calls_are_repeated_between_two_events(gpu: Device, instant: list[float]) -> None:
    timer = Timer(torch.device("cuda"), least=1, most=1)
    calls = {"a": {"fwd": gpu.work("a", 20e-6), "bwd": gpu.work("b", 60e-6)}, "c": {"fwd": gpu.work("c", 1e-6)}}
    times, _ = timer.rounds(calls, 0.0)
    assert times["a"]["fwd"] == pytest.approx([20e-6])
    assert times["c"]["fwd"] == pytest.approx([1e-6])
    assert timer.repeats == {"a fwd": 3, "c fwd": 10}
    assert gpu.log[-18:] == ["flush", *["a"] * 3, "flush", "b", "flush", *["c"] * 10, "wait"]


def test_a_call_that_takes_long_to_queue_gets_more_time_before_it(gpu: Device, instant: list[float]) -> None:
    timer = Timer(torch.device("cuda"), least=1, most=1)
    instant[0] = 4 * FLUSH_S
    gpu.log.clear()
    timer.rounds({"a": {"fwd": gpu.work("a", 1e-3)}}, 0.0)
    # 1.5 times 4 flushes, and one more.
    assert gpu.log == ["wait", "a", "wait", "a", *["flush"] * 7, "a", "wait", *["flush"] * 7, "a", "wait"]


def test_samples_end_with_the_time(gpu: Device, instant: list[float]) -> None:
    instant[0] = 1.0
    times, _ = Timer(torch.device("cuda"), least=3, most=100).rounds({"a": {"fwd": gpu.work("a", 1e-3)}}, 10.0)
    # Three without looking at the clock, then one for each second.
    assert len(times["a"]["fwd"]) == 12


def test_a_budget_runs_out(instant: list[float]) -> None:
    budget = Budget(10.0)
    assert budget.left() == 10.0
    assert not budget.over()
    instant[0] = 20.0
    assert budget.over()
    assert budget.left() == 0.0
