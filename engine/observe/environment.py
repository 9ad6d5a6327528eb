"""What a run ran on: versions, devices, commit. Nothing that names the machine or its user."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "hydra-core", "triton")
"""Distributions whose version is recorded. They are not imported."""

WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")

_ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """The run's surroundings as JSON-serialisable values; what is not there is None.

    Keys: `python`, `platform`, `packages` (name -> version), `cuda`, `nccl`, `devices` (name -> count), `cpu_count`
    (cores this process may use), `git` (`commit`, `dirty`) or None outside a checkout, `world_size` as the launcher
    set it.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "nccl": _nccl(),
        "devices": _devices(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git": git_state(_ROOT),
        "world_size": _world_size(),
    }


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit of the checkout at `root`, and whether tracked files differ from it. None when `root` is no checkout.

    A folder inside another project's checkout (a virtual environment, say) is none: that commit is not ours.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(root, "rev-parse", "--verify", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, or None when git is missing, slow or says no."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, int]:
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {name: names.count(name) for name in names}


def _nccl() -> str | None:
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    version: tuple[object, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(str(part) for part in version)


def _world_size() -> int | None:
    values = (os.environ.get(name, "") for name in WORLD_SIZE_VARIABLES)
    return next((int(value) for value in values if value.isdigit()), None)
