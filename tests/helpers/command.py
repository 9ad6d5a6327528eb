"""Commands as a user types them, each in its own process group, with an environment that no launcher has touched."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.repo import ROOT

_LAUNCH_PREFIXES = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "GROUP_", "ROLE_")
_LAUNCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE", "CROSS_RANK")
_OTHERS = ("MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "OMP_NUM_THREADS", "VIRTUAL_ENV", "PYTHONPATH")


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended. A negative exit code is the number of the signal that ended it."""

    stdout: str
    stderr: str
    exit_code: int

    def __str__(self) -> str:
        return f"exit code {self.exit_code}\n--- stdout ---\n{self.stdout}\n--- stderr ---\n{self.stderr}"


def clean_env(extra: Mapping[str, str] | None = None, *, path: Sequence[Path] = ()) -> dict[str, str]:
    """This environment without a launcher's variables, with this interpreter's scripts first and Octant importable.

    Args:
        extra: variables to set.
        path: folders to import from before the repository.
    """
    dropped = {*_LAUNCH_NAMES, *_OTHERS}
    env = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(_LAUNCH_PREFIXES)}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    inherited = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    env["PYTHONPATH"] = os.pathsep.join([*map(str, (*path, ROOT, ROOT / "kernels")), *inherited])
    return env | dict(extra or {})


def run_command(
    args: Sequence[str] | str, cwd: Path, timeout_s: float, *, env: Mapping[str, str] | None = None
) -> Done:
    """Run a command (a string is split as a shell does, but no shell runs) and wait for it.

    Raises `AssertionError` with the output so far when it is still running after `timeout_s`; its whole process group
    is then killed.
    """
    process = start_command(args, cwd, env=env)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        stdout, stderr = process.communicate()
        raise AssertionError(f"{args} still running after {timeout_s:.0f} s\n{stdout}\n{stderr}") from None
    return Done(stdout, stderr, process.returncode)


def start_command(
    args: Sequence[str] | str, cwd: Path, *, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a command with piped text output, as the leader of a new process group."""
    return subprocess.Popen(
        shlex.split(args) if isinstance(args, str) else list(args),
        cwd=cwd,
        env=dict(clean_env() if env is None else env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a process group that `start_command` began."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
