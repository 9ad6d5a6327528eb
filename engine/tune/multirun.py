"""`python -m engine.train -m`: each combination of values is a run of its own, started and watched from outside."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config import entry, launch_env, rules, rules_search, sweep
from engine.config.enums import LaunchTarget, SearchMethod
from engine.config.load import load
from engine.config.sweep import Sweep
from engine.data.storage.files import write_json
from engine.dist.init import resolve_device_type
from engine.errors import LaunchError
from engine.observe.log import say
from engine.train import local
from engine.tune import grid, records, report, slurm_array
from engine.tune.drive import Source, drive
from engine.tune.records import Status
from engine.tune.runner import Runner, slots

FLAGS = ("-m", "--multirun")
LOCK_FILE = ".lock"
LAUNCH = "launch"
"""Folder of what launch/submit.py writes."""


def main(argv: Sequence[str]) -> int:
    """Search; exit code 0 when some run has ended well, else 1; 75 or 130 when a signal has ended the search early.

    Raises:
        LaunchError: 585 under a launcher; 588 a search is going on there; see also `slots`, `open_search` and
            `source_of`.
        ConfigError: see `sweep.read` and `rules_search`.
    """
    asked = sweep.read([word for word in argv if word not in FLAGS])
    rules_search.require(asked)
    cfg = asked.cfg
    if launch_env.read(os.environ) is not None:
        rule = "a launcher has started this, and every one of its ranks would search"
        raise LaunchError.of(585, "-m", "(flag)", rule, "Start it as python -m engine.train -m, inside the same job")
    array = cfg.launch.target is LaunchTarget.slurm
    places = [] if array else slots(cfg)
    with _held(folder_of(asked)) as root:
        begun = (root / records.SWEEP_FILE).is_file()
        open_search(asked, root)
        trials = records.read(root)
        if not trials and cfg.search.method is SearchMethod.grid:
            trials = grid.combinations(root, asked, common_words(asked))
            for trial in trials:
                records.write(root, trial)
        slurm_array.settle(root, trials, cfg.search.metric)
        for trial in trials:
            if records.settle(root, trial, cfg.search.metric):
                records.write(root, trial)
        if array:
            code = submit(asked, root, trials, argv)
            if code != 0 and not begun:
                clear(root)
            return code
        number = drive(source_of(root, asked, trials), Runner(root, places, cfg.search.metric))
    if number is not None:
        say(f"search ended early; the same command goes on with it ({root})")
        return entry.INTERRUPTED if number == signal.SIGINT else entry.STOPPED
    trials = records.read(root)
    say(report.table(trials, cfg.search.direction))
    say(f"python -m engine.tune report {root}")
    return 0 if any(trial.status is Status.done for trial in trials) else 1


def folder_of(asked: Sweep) -> Path:
    """`<run.dir>/<search.study>/`, as an absolute path."""
    cfg = asked.cfg
    return (Path(cfg.run.dir) / (cfg.search.study or f"{cfg.run.name}-{cfg.search.method}")).absolute()


def open_search(asked: Sweep, root: Path) -> None:
    """Begin a search in `root`, or make sure that the one there is the same.

    Raises:
        LaunchError: 580 the folder holds another search.
    """
    begun, ours = (root / records.SWEEP_FILE).is_file(), definition_of(asked)
    if begun and asked.cfg.run.overwrite:
        clear(root)
    others = [path.name for path in root.iterdir() if path.name != LOCK_FILE]
    if others and not begun:
        rule = f"{root} holds no search but {', '.join(sorted(others)[:3])}"
        raise LaunchError.of(580, "search.study", root.name, rule, f"Use search.study={root.name}-search")
    if not (root / records.SWEEP_FILE).is_file():
        write_json(root / records.SWEEP_FILE, ours)
    theirs = records.definition(root)
    changed = [key for key in ours if ours[key] != theirs.get(key)]
    if changed:
        rule = f"{root} holds a search with other {' and '.join(changed)}"
        way_out = f"Use search.study={root.name}-2, the same words to go on with it, or run.overwrite=true"
        raise LaunchError.of(580, "search.study", root.name, rule, way_out)


def clear(root: Path) -> None:
    """Remove what a search has written into its folder, and nothing else."""
    for path in root.iterdir():
        if path.is_dir() and (path.name.isdecimal() or path.name in (records.TRIALS, LAUNCH)):
            shutil.rmtree(path)
        elif path.name in (records.SWEEP_FILE, records.JOBS_FILE, records.DATABASE, grid.WORDS_FILE, *report.FILES):
            path.unlink()


def submit(asked: Sweep, root: Path, trials: Sequence[records.Trial], argv: Sequence[str]) -> int:
    """Hand the runs that have not ended to Slurm, as an array of jobs; the exit code of launch/submit.py.

    Raises:
        LaunchError: 590 this installation has no launch/submit.py.
    """
    queued = slurm_array.queued(root)
    if queued:
        say(f"{len(queued)} runs are still in the queue, or running")
    waiting = [trial for trial in trials if trial.status in records.OPEN and trial.number not in queued]
    waiting = [trial for trial in waiting if not slurm_array.refused(root, trial, asked.cfg)]
    if not waiting:
        say(f"no run is left to submit, of {len(trials)}: python -m engine.tune report {root}")
        return 0
    script = Path(__file__).parents[2] / "launch" / "submit.py"
    if not script.is_file():
        rule = f"jobs are submitted by launch/submit.py of a checkout, and there is no {script}"
        raise LaunchError.of(590, "launch", "slurm", rule, "Search from a checkout, or use launch=local inside a job")
    path = grid.write_words(root, waiting)
    say(f"{len(waiting)} runs, the words of each on a line of {path}")
    own = [word for word in argv if word.lstrip("+~").startswith(("launch=", "launch."))]
    own += [sweep.quoted("launch.slurm.trials", str(path))]
    own += [sweep.quoted("run.dir", str(root.parent)), sweep.quoted("run.name", root.name)]
    first = grid.words_of(asked.axes, waiting[0].values)
    done = subprocess.run([sys.executable, str(script), *asked.words, *first, *own], stdout=subprocess.PIPE, text=True)
    code = done.returncode
    say(done.stdout.rstrip())
    if code == 0:
        slurm_array.remember(root, done.stdout, waiting)
        say(f"when jobs have ended: python -m engine.tune report {root}")
    return code


def definition_of(asked: Sweep) -> dict[str, Any]:
    """What makes a search the same one: shared words, values, and options of the search less `jobs`."""
    search = {name: getattr(asked.cfg.search, name) for name in asked.cfg.search.__slots__}
    del search["jobs"], search["study"], search["space"]
    axes: dict[str, list[Any]] = {
        axis.option: list(axis.choices) or [axis.low, axis.high, axis.log] for axis in asked.axes
    }
    return {"words": list(asked.words), "values": axes, "search": search}


def common_words(asked: Sweep) -> list[str]:
    """Overrides that runs get beside the user's: a share of the cores, where several run at once on the CPU."""
    cfg = asked.cfg
    if cfg.search.jobs == 1 or resolve_device_type(cfg.train.device) != "cpu":
        return []
    cores = os.cpu_count() or 1
    return [f"train.cpu_threads={max(1, cores // (cfg.search.jobs * local.world_size(cfg)))}"]


def source_of(root: Path, asked: Sweep, trials: Sequence[records.Trial]) -> Source:
    """What decides about runs.

    Raises:
        LaunchError: 586 Optuna is not installed.
        ConfigError: runs of the lengths of the phases break rules.
    """
    if asked.cfg.search.method is SearchMethod.grid:
        return grid.Grid(trials)
    try:
        from engine.tune.coarse_to_fine import CoarseToFine, short_words
    except ModuleNotFoundError as error:
        rule = f"it needs the package {error.name}, which is not installed"
        way_out = "pip install 'octant-engine[tune]', or use search=grid"
        raise LaunchError.of(586, "search.method", asked.cfg.search.method, rule, way_out) from error
    first = [axis.first for axis in asked.axes]
    for share in (asked.cfg.search.coarse_steps, asked.cfg.search.fine_steps, 1.0):
        cfg = load([*asked.words, *first, *short_words(asked, share)[0]])
        rules.require(cfg, local.world_size(cfg))
    return CoarseToFine(root, asked, trials, common_words(asked))


@contextmanager
def _held(root: Path) -> Iterator[Path]:
    """Keep other searches out of a folder. Raises LaunchError 588: another one is in there."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            rule = f"another process is searching in {root}"
            way_out = "Wait for it to end, or name another folder"
            raise LaunchError.of(588, "search.study", root.name, rule, way_out) from error
        yield root
