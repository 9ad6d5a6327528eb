"""The loop of every search: start runs while there is room, look at those under way, take their results."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from engine.observe.log import say
from engine.tune.records import Trial
from engine.tune.runner import Runner

POLL_S = 0.1


class Source(Protocol):
    """Decides which runs there are."""

    def next(self) -> Trial | None:
        """The next run to start; None: none now, and none at all once nothing is under way."""

    def hopeless(self, trial: Trial) -> bool:
        """Whether a run that is under way is not worth its rest."""

    def ended(self, trial: Trial) -> None:
        """Take the result of a run over."""


def drive(source: Source, runner: Runner) -> int | None:
    """Go through the runs of `source`; the number of the signal that ended the search early, or None."""
    with _stopped_by_signals(runner) as received:
        while True:
            while runner.free and (trial := source.next()) is not None:
                say(f"run {trial.number} ({trial.phase}): {trial}")
                runner.start(trial)
            if not runner.jobs:
                return received[0] if received else None
            for trial in runner.ended():
                value = "no result" if trial.value is None else f"{trial.value:.4f}"
                say(f"run {trial.number} ({trial.phase}): {trial.status}, {value}, {trial.seconds:.0f} s")
                source.ended(trial)
            for job in runner.jobs:
                if not job.pruned and source.hopeless(job.trial):
                    runner.end(job, pruned=True)
            time.sleep(POLL_S)


@contextmanager
def _stopped_by_signals(runner: Runner) -> Iterator[list[int]]:
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        runner.stop()

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
