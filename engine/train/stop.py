"""SIGTERM and SIGUSR1 end a run after the step that is being done or the next one, the same on every rank."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from engine.dist import init
from engine.observe.log import say
from engine.train import early

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they kill: the end of a job, and Slurm's early warning."""


class StopSignal:
    """Whether some rank was told to stop. Every rank asks after every step.

    A signal reaches the ranks at different moments, and some of them perhaps never. What each knows after a step is
    summed over all of them while the next step runs, so that they agree one step later and nobody waits.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._group = init.host_group() if dist.is_initialized() and dist.get_world_size() > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over the signals, and a warning that has come before. Only the main thread can."""
        self._received = early.received
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self) -> bool:
        """Whether all ranks stop after this step. Collective."""
        if self._group is None:
            return self._received is not None
        if self._pending is not None:
            self._pending.wait()
        stop = bool(self._flag.item())
        self._flag.fill_(int(self._received is not None))
        self._pending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop

    def announce(self, step: int) -> None:
        """Say why training ends."""
        name = signal.Signals(self._received).name if self._received is not None else "a signal at another rank"
        say(f"step {step}: ending, as asked by {name}")
