"""Times of several systems side by side: CUDA events, a cold L2 cache, one sample of each in turn.

Between two samples a buffer larger than any L2 is written. That writing is also the time in which the host queues what
comes next, so that a call's own overhead on the host stays out of the figure: it is repeated for calls whose queueing
takes longer. On a CPU, where figures mean nothing, the clock is the host's.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]
Times = dict[str, dict[str, list[float]]]
"""Seconds, by system and phase."""

FLUSH_BYTES = 256 * 2**20
SHORT_S = 50e-6
"""A call that takes less is made several times between two events, the later ones with a warm cache."""
MOST_FLUSHES = 20
WARM_UP = 2


class Budget:
    """Seconds of a suite, from the moment that it starts."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.perf_counter() + seconds

    def left(self) -> float:
        return max(0.0, self._end - time.perf_counter())

    def over(self) -> bool:
        return self.left() == 0.0


@dataclass(frozen=True, slots=True)
class _Plan:
    call: Call
    repeats: int
    flushes: int


@dataclass(slots=True)
class Timer:
    """Samples on one device; `least` to `most` of each call."""

    device: torch.device
    least: int = 10
    most: int = 100
    repeats: dict[str, int] = field(default_factory=dict)
    """Calls within one sample of the last `rounds`, by "system phase", where it is not one."""
    _flush: torch.Tensor | None = None
    _flush_s: float = 0.0

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)
            self._flush_s = min(self._event_seconds(self._flush.zero_) for _ in range(5))

    def rounds(self, systems: Mapping[str, Mapping[str, Call]], seconds: float) -> tuple[Times, dict[str, str]]:
        """Sample all phases of all systems in turn until `seconds` are over.

        Returns:
            Seconds of each sample, and for systems that failed on the way the reason.
        """
        failed: dict[str, str] = {}
        plans: dict[str, dict[str, _Plan]] = {}
        self.repeats = {}
        for name, phases in systems.items():
            try:
                plans[name] = {phase: self._plan(call) for phase, call in phases.items()}
            except Exception as error:
                failed[name] = reason(error)
                continue
            self.repeats |= {f"{name} {phase}": p.repeats for phase, p in plans[name].items() if p.repeats > 1}
        times: Times = {name: {phase: [] for phase in phases} for name, phases in plans.items()}
        end = time.perf_counter() + seconds
        for number in range(self.most):
            if number >= self.least and time.perf_counter() >= end:
                break
            # Every other round runs backwards: no system is always behind the same one.
            broken = self._round(dict(reversed(plans.items())) if number % 2 else plans, times)
            for name in broken:
                del plans[name], times[name]
            failed |= broken
        return times, failed

    def _round(self, plans: Mapping[str, Mapping[str, _Plan]], times: Times) -> dict[str, str]:
        """One sample of everything; systems that failed and why."""
        failed: dict[str, str] = {}
        pending = []
        for name, phases in plans.items():
            try:
                pending += [(times[name][phase], self._sample(plan)) for phase, plan in phases.items()]
            except Exception as error:
                failed[name] = reason(error)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for values, read in pending:
            values.append(read())
        return failed

    def _plan(self, call: Call) -> _Plan:
        if self.device.type != "cuda":
            call()
            return _Plan(call, 1, 0)
        queueing = math.inf
        for _ in range(WARM_UP):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            call()
            queueing = min(queueing, time.perf_counter() - start)
        flushes = min(MOST_FLUSHES, 1 + math.ceil(1.5 * queueing / self._flush_s))
        read = self._sample(_Plan(call, 1, flushes))
        torch.cuda.synchronize(self.device)
        found = read()
        return _Plan(call, min(10, math.ceil(SHORT_S / found)) if found < SHORT_S else 1, flushes)

    def _sample(self, plan: _Plan) -> Callable[[], float]:
        """Queue one sample; what comes back reads its seconds after a synchronisation."""
        if self._flush is None:
            start = time.perf_counter()
            plan.call()
            taken = time.perf_counter() - start
            return lambda: taken
        for _ in range(plan.flushes):
            self._flush.zero_()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(plan.repeats):
            plan.call()
        last.record()
        return lambda: first.elapsed_time(last) * 1e-3 / plan.repeats

    def _event_seconds(self, call: Call) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) * 1e-3


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    # Of a path the last part: rows name no folders of one machine.
    text = re.sub(r"(?<!\w)/(?:[\w.-]+/)+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
