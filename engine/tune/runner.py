"""Runs as subprocesses, several at once, each with its share of the GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config.schema import Config
from engine.dist.init import resolve_device_type
from engine.errors import LaunchError
from engine.train.local import die_with
from engine.tune import records
from engine.tune.records import Status, Trial

GRACE_S = 300.0
"""Seconds that a run has to save its state after SIGTERM."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(slots=True)
class Job:
    """A run that is under way."""

    trial: Trial
    process: subprocess.Popen[bytes]
    slot: int
    since: float
    log_begin: int
    """Bytes of its log that earlier starts have written."""
    pruned: bool = False
    kill_at: float | None = None


class Runner:
    """Starts runs in free slots, and puts on record how they end."""

    def __init__(self, root: Path, slots: Sequence[dict[str, str]], metric: str) -> None:
        self._root, self._slots, self._metric = root, list(slots), metric
        self.jobs: list[Job] = []
        self.stopping = False

    @property
    def free(self) -> bool:
        """Whether another run can start."""
        return not self.stopping and len(self.jobs) < len(self._slots)

    def start(self, trial: Trial) -> None:
        """Begin a run, or go on with it."""
        taken = {job.slot for job in self.jobs}
        slot = next(index for index in range(len(self._slots)) if index not in taken)
        trial.status = Status.running
        records.write(self._root, trial)
        with self._log(trial).open("ab") as log:
            begin = log.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "engine.train", *trial.words],
                env=dict(os.environ) | self._slots[slot],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the search, which passes it on.
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )
        self.jobs.append(Job(trial, process, slot, time.monotonic(), begin))
        if self.stopping:  # A signal came while it was being started.
            self.end(self.jobs[-1])

    def end(self, job: Job, *, pruned: bool = False) -> None:
        """Ask a run to end."""
        job.pruned = job.pruned or pruned
        if job.kill_at is None:
            job.process.terminate()
            job.kill_at = time.monotonic() + GRACE_S

    def stop(self) -> None:
        """Ask all runs to save their state and end, and start no other."""
        self.stopping = True
        for job in self.jobs:
            self.end(job)

    def ended(self) -> list[Trial]:
        """Runs that have ended since the last call, with status and value on record."""
        done = [job for job in self.jobs if job.process.poll() is not None]
        for job in self.jobs:
            if job.kill_at is not None and time.monotonic() > job.kill_at:
                job.process.kill()
        for job in done:
            self.jobs.remove(job)
            self._judge(job)
            records.write(self._root, job.trial)
        return [job.trial for job in done]

    def _judge(self, job: Job) -> None:
        trial, code = job.trial, job.process.returncode
        trial.seconds += time.monotonic() - job.since
        if code == 0:
            records.take_result(self._root, trial, self._metric)
            return
        with self._log(trial).open(errors="replace") as log:
            log.seek(job.log_begin)
            records.take_failure(self._root, trial, self._metric, code, log.read())
        if job.pruned:
            trial.status = Status.pruned
        elif self.stopping:
            trial.status = Status.stopped

    def _log(self, trial: Trial) -> Path:
        return self._root / records.TRIALS / f"{trial.number}.log"


def slots(cfg: Config) -> list[dict[str, str]]:
    """For each of `search.jobs` runs at once the variables that give it its GPUs; on the CPU there are none.

    Raises:
        LaunchError: 579 more runs at once than GPUs.
    """
    jobs = cfg.search.jobs
    if resolve_device_type(cfg.train.device) == "cpu":
        return [{} for _ in range(jobs)]
    given = os.environ.get(VISIBLE)
    gpus = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    share = len(gpus) // jobs
    if not share:
        rule = f"this machine shows {len(gpus)} GPUs and each run needs its own"
        raise LaunchError.of(579, "search.jobs", jobs, rule, f"Use search.jobs={len(gpus)}")
    return [{VISIBLE: ",".join(gpus[index * share : (index + 1) * share])} for index in range(jobs)]
