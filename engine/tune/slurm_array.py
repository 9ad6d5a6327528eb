"""Runs of a search as tasks of Slurm arrays: which are still under way, and how the others have ended.

`launch/slurm/array.sbatch` leaves `<array>-<task>.code` with the exit code and the number of the job in
`launch/logs/` of the search.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import rules
from engine.config.load import load
from engine.config.schema import Config
from engine.data.storage.files import write_json
from engine.errors import ConfigError
from engine.tune import records
from engine.tune.records import OPEN, Status, Trial

LOGS = Path("launch", "logs")
_TIMEOUT_S = 20


def remember(root: Path, said: str, trials: Sequence[Trial]) -> None:
    """Note which runs are the tasks, from 1 on, of the array whose number submit `said` on a line of its own."""
    found = re.findall(r"^(\d+)$", said, re.MULTILINE)
    if found:
        entry = {"job": found[-1], "numbers": [trial.number for trial in trials]}
        write_json(root / records.JOBS_FILE, [*_jobs(root), entry])


def _jobs(root: Path) -> list[dict[str, Any]]:
    path = root / records.JOBS_FILE
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return found


def queued(root: Path) -> set[int]:
    """Numbers of the runs that wait in Slurm's queue or run; empty where Slurm does not know their jobs any more."""
    found = set()
    for entry in _jobs(root):
        words = ["squeue", "--noheader", "--array", f"--jobs={entry['job']}", "--format=%K"]
        try:
            asked = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            continue
        found |= {entry["numbers"][int(task) - 1] for task in asked.stdout.split() if task.isdecimal()}
    return found


def settle(root: Path, trials: Sequence[Trial], metric: str) -> None:
    """Put on record how the tasks of arrays have ended."""
    by_number = {trial.number: trial for trial in trials}
    for entry in _jobs(root):
        for task, number in enumerate(entry["numbers"], start=1):
            path, trial = root / LOGS / f"{entry['job']}-{task}.code", by_number[number]
            if trial.status not in OPEN or not path.is_file():
                continue
            code, _, job = path.read_text().partition(" ")
            if int(code) != 0:
                logs = sorted((root / LOGS).glob(f"{job.strip()}-rank*.log"))
                output = "".join(log.read_text(errors="replace") for log in logs)
                records.take_failure(root, trial, metric, int(code), output)
                records.write(root, trial)


def refused(root: Path, trial: Trial, cfg: Config) -> bool:
    """Whether the options of a run break a rule, which is put on record; the rest of the array can do without it."""
    launch, layout = cfg.launch, cfg.parallel
    each = launch.ranks_per_node or launch.gpus_per_node
    world = launch.nodes * each if each else layout.pp * layout.context * layout.tp * (layout.dp or 1)
    try:
        rules.require(load(trial.words), world)
    except ConfigError as error:
        trial.status, trial.exit_code = Status.refused, error.exit_code
        trial.last_lines = str(error).splitlines()
        records.write(root, trial)
        return True
    return False
