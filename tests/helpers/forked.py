"""`python -m engine.train` in processes forked from one that has imported it: it begins in a fraction of a second."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from engine.dist.spawn import PRELOAD as BASE
from engine.study.parity import PRELOAD
from engine.train.local import meeting_point
from tests.helpers.command import Done


@dataclass(frozen=True, slots=True)
class Accident:
    """What happens on every rank right before step number `step` (from 1)."""

    step: int
    kill: bool = False
    """SIGKILL, by itself."""
    file_bytes: int | None = None
    """No file can be longer from here on, as if the disk were full."""
    until: int | None = None
    """Step right before which files can be of any size again."""
    first: Path | None = None
    """A file to wait for before it happens."""


class Training:
    """A training that runs. Its ranks are killed at the end of a `with` block."""

    def __init__(self, words: Sequence[str], world: int, accident: Accident | None = None) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*BASE, *PRELOAD])
        self._folder = tempfile.TemporaryDirectory(prefix="octant-forked-")
        self.words, self._outputs = list(words), Path(self._folder.name)
        self._store, meeting = meeting_point()
        self.ranks: list[BaseProcess] = [
            context.Process(
                target=_rank, args=(rank, world, meeting, self.words, self._folder.name, accident), daemon=True
            )
            for rank in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                rank.kill()
            rank.join(5)
        self._folder.cleanup()

    def said(self, stream: str = "stdout") -> str:
        """What all ranks have written to a stream so far."""
        return "".join(path.read_text() for path in sorted(self._outputs.glob(f"*.{stream}")))

    def wait(self, timeout_s: float = 120) -> Done:
        """Wait for the end. The exit code is the first one that is not 0.

        Raises AssertionError with the output when it is still running after `timeout_s`.
        """
        end = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        assert not any(rank.is_alive() for rank in self.ranks), f"{self.words}\n{self.said()}\n{self.said('stderr')}"
        codes = [rank.exitcode or 0 for rank in self.ranks]
        return Done(self.said(), self.said("stderr"), next((code for code in codes if code), 0))


def train(words: Sequence[str], world: int = 1, accident: Accident | None = None) -> Done:
    """One training from begin to end."""
    with Training(words, world, accident) as training:
        return training.wait()


def _rank(
    rank: int, world: int, meeting: dict[str, str], words: list[str], folder: str, accident: Accident | None
) -> None:
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, f"{rank}.{stream}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(meeting)
    code = 1
    try:
        from engine.train import __main__ as command

        # No launcher is there that would kill the others.
        command.SILENT_WAIT_S = 0.0
        if accident is not None:
            _prepare(accident)
        code = command.main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _prepare(accident: Accident) -> None:
    from engine.train import loop

    rate = loop.learning_rate

    def learning_rate(optim: Any, step: int, steps: int) -> float:
        if step + 1 == accident.step:
            while accident.first is not None and not accident.first.exists():
                time.sleep(0.002)
            if accident.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if accident.file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (accident.file_bytes, resource.RLIM_INFINITY))
        if step + 1 == accident.until:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return rate(optim, step, steps)

    loop.learning_rate = learning_rate
