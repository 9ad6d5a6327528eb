"""The folder of a run."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from itertools import count
from pathlib import Path
from typing import TextIO

from engine.config.schema import RunConfig
from engine.errors import CheckpointError

METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
MICRO_BATCH_FILE = "micro_batch.json"

_locks: dict[Path, TextIO] = {}
"""Open lock files by folder: the kernel drops a lock when its file is closed."""

OWNED = (
    METRICS_FILE,
    "config.yaml",
    "environment.json",
    "kernels.json",
    MICRO_BATCH_FILE,
    "loss.png",
    "weights",
    "weights.partial",
    "weights.old",
    "checkpoints",
    "summary.json",
    "profile",
)
"""What Octant writes into a run folder. Only these are removed by `run.overwrite=true`."""


def open_run_folder(cfg: RunConfig) -> Path:
    """Create `<dir>/<name>/` and return it. Called by rank 0 alone.

    With `run.overwrite` the results of an earlier run are removed; files that Octant does not write stay.

    Raises:
        CheckpointError: 604 another process is writing there; see also `usable_run_folder`.
    """
    folder = hold_run_folder(cfg)
    if cfg.overwrite:
        try:
            _remove_owned(folder)
        except OSError as error:
            raise _not_writable(cfg.dir, folder, error) from error
    return folder


def usable_run_folder(cfg: RunConfig) -> Path:
    """Make sure that `<dir>/<name>/` exists and can take a run's results; what it holds stays as it is.

    Raises:
        CheckpointError: 601 the folder holds results already, 602 it cannot be written.
    """
    folder = Path(cfg.dir) / cfg.name
    if has_results(folder) and not cfg.overwrite and not cfg.resume:
        free = _free_name(Path(cfg.dir), cfg.name)
        raise CheckpointError.of(
            601,
            "run.name",
            cfg.name,
            f"{folder} already holds the results of a run ({METRICS_FILE})",
            f"Use run.name={free}, run.resume=true to go on with it, or run.overwrite=true to replace them",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(cfg.dir, folder, error) from error
    return folder


def hold_run_folder(cfg: RunConfig) -> Path:
    """Keep other runs out of `<dir>/<name>/` until this process ends, and return it. Where the file system knows no
    locks, do without.

    Raises:
        CheckpointError: 604 another process is writing there; see also `usable_run_folder`.
    """
    folder = usable_run_folder(cfg)
    key = folder.resolve()
    if key in _locks:
        return folder
    lock = (folder / LOCK_FILE).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError.of(
            604,
            "run.name",
            cfg.name,
            f"another run is writing into {folder}",
            f"Use run.name={_free_name(folder.parent, cfg.name)}, or wait for it to end",
        ) from error
    except OSError:
        pass
    _locks[key] = lock
    return folder


def _not_writable(dir: str, folder: Path, error: OSError) -> Exception:
    return CheckpointError.of(
        602,
        "run.dir",
        dir,
        f"{folder} cannot be written: {error.strerror or error}",
        "Point run.dir to a folder that this user may write, such as run.dir=runs",
    )


def has_results(folder: Path) -> bool:
    """True when a run has recorded at least one line of metrics there."""
    path = folder / METRICS_FILE
    return path.is_file() and path.stat().st_size > 0


def _free_name(parent: Path, name: str) -> str:
    """The first of `name-2`, `name-3`, ... that does not exist."""
    return next(f"{name}-{number}" for number in count(2) if not (parent / f"{name}-{number}").exists())


def _remove_owned(folder: Path) -> None:
    for entry in OWNED:
        path = folder / entry
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
