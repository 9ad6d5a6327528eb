"""The processes that build shards, seen from the builder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from engine.data.build.shard import Job, Shard
from engine.data.build.worker import Answer, Done, Failed, Moved, Refused
from engine.errors import DataError

_POLL_S = 0.5
# Not `-m`: what the worker sends must be of the same classes here and there.
_START = "from engine.data.build.worker import main; main()"


class _Worker:
    """A process and the shard it works on."""

    def __init__(self, job: Job, first: Shard) -> None:
        self.pipe, theirs = Pipe()
        # The same modules as here, with the threads of one core each: every core has a worker.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self.shard = first
        self.send(job)
        self.send(first)

    def send(self, message: Job | Shard) -> None:
        """A dead process is noticed when it is read from."""
        with suppress(OSError):
            self.pipe.send(message)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def build_shards(job: Job, shards: Sequence[Shard], workers: int, moved: Callable[[int], None]) -> list[Shard]:
    """Have `workers` processes finish all `shards`; those that an earlier build finished, which is the result.

    `moved` gets numbers of bytes of input, and 0 twice a second. When this raises, no process is left, and the
    finished shards stay. Raises DataError: 450 a worker died or failed, and what a worker refuses.
    """
    waiting, busy, kept = deque(shards), dict[Connection, _Worker](), list[Shard]()
    try:
        while waiting and len(busy) < workers:
            worker = _Worker(job, waiting.popleft())
            busy[worker.pipe] = worker
        while busy:
            for worker, answer in _answers(busy):
                if isinstance(answer, Moved):
                    moved(answer.size)
                    continue
                if answer.kept:
                    kept.append(answer.shard)
                if waiting:
                    worker.shard = waiting.popleft()
                    worker.send(worker.shard)
                else:
                    del busy[worker.pipe]
                    worker.close()
            moved(0)
    finally:
        for worker in busy.values():
            worker.close()
    return kept


def _answers(busy: dict[Connection, _Worker]) -> Iterator[tuple[_Worker, Moved | Done]]:
    for pipe in wait(list(busy), _POLL_S):
        worker = busy[pipe]  # type: ignore[index]
        try:
            answer: Answer = worker.pipe.recv()
        except (EOFError, OSError):
            raise _died(worker.shard, _ending(worker.process.wait()), len(busy)) from None
        if isinstance(answer, Refused):
            raise DataError(answer.violations)
        if isinstance(answer, Failed):
            raise _died(worker.shard, f"failed ({answer.reason})", len(busy))
        yield worker, answer


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), as the system does when memory runs out"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _died(shard: Shard, what: str, workers: int) -> Exception:
    return DataError.of(
        450,
        "data.workers",
        workers,
        f"the process that built shard {shard.number} ({shard.size / 1e6:.1f} MB: {shard.files()}) {what}",
        "Finished shards are kept: start again, with a smaller data.workers if memory ran out",
    )
