"""What a search knows of its runs, on disk: `sweep.json`, and `trials/<number>.json` with `<number>.log` beside it.

A run's own folder is `<search>/<number>/`. Every file is replaced whole, so that a search may be killed at any moment.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine.config.entry import STOPPED
from engine.config.sweep import quoted
from engine.data.storage.files import write_json
from engine.errors import LaunchError
from engine.observe.folder import METRICS_FILE

SWEEP_FILE = "sweep.json"
TRIALS = "trials"
SUMMARY_FILE = "summary.json"
JOBS_FILE = "jobs.json"
DATABASE = "study.db"
KEPT_LINES = 20
"""Of the output of a run that has not ended well."""
REFUSED, KILLED = LaunchError.exit_code, (137, -9)
"""Exit codes of `engine.train`, and of a process that is killed, which a host does when memory runs out."""
BUSY = "[OCT604]"
"""The run of a search that was killed still saves its state: start it again."""


class Status(StrEnum):
    """How far a run is, or how it has ended."""

    waiting = "waiting"
    running = "running"
    stopped = "stopped"
    """Saved and ended by a signal; the same search goes on with it."""
    done = "done"
    pruned = "pruned"
    failed = "failed"
    out_of_memory = "out_of_memory"
    refused = "refused"
    """Its options break a rule."""
    diverged = "diverged"
    """It ended well with a metric that is not finite."""


OPEN = (Status.waiting, Status.running, Status.stopped)
"""A search that is started again goes on with these."""


@dataclass(slots=True, kw_only=True)
class Trial:
    """One run of a search."""

    number: int
    phase: str
    """`grid`, `coarse`, `fine` or `final`."""
    values: dict[str, str]
    """Option -> value, as typed."""
    words: list[str]
    """All overrides of the run."""
    steps: int
    """Its length."""
    status: Status = Status.waiting
    exit_code: int | None = None
    value: float | None = None
    """Last value of the metric; of a run that has not ended well, as far as it came."""
    steps_done: int = 0
    seconds: float = 0.0
    """Over all its starts."""
    last_lines: list[str] = field(default_factory=list)
    """End of the output of a run that has not ended well."""

    def __str__(self) -> str:
        return " ".join(f"{option}={value}" for option, value in self.values.items())


def run_words(root: Path, number: int) -> list[str]:
    """The overrides that give run `number` its folder and let it go on where it was ended."""
    return [quoted("run.dir", str(root)), quoted("run.name", str(number)), "run.resume=true"]


def write(root: Path, trial: Trial) -> None:
    """Put a run on record."""
    (root / TRIALS).mkdir(exist_ok=True)
    write_json(root / TRIALS / f"{trial.number}.json", asdict(trial))


def read(root: Path) -> list[Trial]:
    """All runs on record, by number."""
    paths = sorted((root / TRIALS).glob("*.json"), key=lambda path: int(path.stem))
    found = []
    for path in paths:
        content = json.loads(path.read_text())
        found.append(Trial(**(content | {"status": Status(content["status"])})))
    return found


def settle(root: Path, trial: Trial, metric: str) -> bool:
    """Whether a run that is on record as open has ended well after all, which its folder says; takes the result over.

    So it is when the search was killed in between, and when other jobs run it.
    """
    if trial.status not in OPEN or not (root / str(trial.number) / SUMMARY_FILE).is_file():
        return False
    take_result(root, trial, metric)
    return True


def take_result(root: Path, trial: Trial, metric: str) -> None:
    """Set status and value of a run that has ended well."""
    points = metric_points(root / str(trial.number), metric)
    trial.exit_code, trial.steps_done = 0, trial.steps
    trial.value = points[-1][1] if points else None
    finite = trial.value is not None and math.isfinite(trial.value)
    trial.status = Status.done if finite else Status.diverged
    if not points:
        trial.last_lines = [f"no line of {METRICS_FILE} holds {metric}"]


def take_failure(root: Path, trial: Trial, metric: str, code: int, output: str) -> None:
    """Set status and value of a run that has ended with an exit code other than 0, and with `output`."""
    run = root / str(trial.number)
    points = metric_points(run, metric)
    trial.exit_code, trial.steps_done = code, last_step(run)
    trial.value = points[-1][1] if points else None
    trial.last_lines = output.splitlines()[-KEPT_LINES:]
    memory = "out of memory" in output.lower() or "OutOfMemoryError" in output
    if code == STOPPED or BUSY in output:
        trial.status = Status.stopped
    elif memory or code in KILLED:
        trial.status = Status.out_of_memory
    else:
        trial.status = Status.refused if code == REFUSED else Status.failed


def metric_points(run: Path, metric: str) -> list[tuple[int, float]]:
    """`(step, value)` of a run so far, steps from 1 on. A line that is being written is left out."""
    path = run / METRICS_FILE
    if not path.is_file():
        return []
    points = []
    for line in path.read_text().splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if metric in row and row["step"] > 0:
            points.append((int(row["step"]), float(row[metric])))
    return points


def last_step(run: Path) -> int:
    """Steps that a run has on record."""
    return max((step for step, _ in metric_points(run, "loss")), default=0)


def definition(root: Path) -> dict[str, Any]:
    """What the search in `root` was asked for. Raises LaunchError 583: there is none."""
    try:
        content: dict[str, Any] = json.loads((root / SWEEP_FILE).read_text())
    except (OSError, ValueError) as error:
        rule = f"it holds no {SWEEP_FILE}, which every search writes"
        raise LaunchError.of(583, "SEARCH_FOLDER", root, rule, "Name the folder that the search printed") from error
    return content
