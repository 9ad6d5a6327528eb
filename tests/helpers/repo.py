"""The repository as files: where it is, what belongs to it."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("engine", "kernels", "launch", "benchmarks", "tests")


@cache
def files(*suffixes: str) -> list[Path]:
    """Files that are, or with the next commit could be, in the repository; all, or those with one of `suffixes`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the repository is unknown")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    found = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    return [path for path in found if not suffixes or path.suffix in suffixes]


def python_files(*folders: str) -> list[Path]:
    """Python files under the named top-level folders; all code folders when none is named."""
    wanted = folders or CODE_FOLDERS
    return [path for path in files(".py") if name(path).split("/")[0] in wanted]


def name(path: Path) -> str:
    """Path inside the repository, with slashes."""
    return path.relative_to(ROOT).as_posix()
