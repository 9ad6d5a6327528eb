"""A rank whose launcher has died is told so with SIGTERM, the signal that saves the state and ends the run.

DeepSpeed's `deepspeed` command passes no signal on: it dies, and its child `deepspeed.launcher.launch` trains on with
the ranks. torchrun passes SIGTERM on, but cannot when it is killed.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.5
WATCHED = ("deepspeed", "torchrun")
"""Launchers whose end must end their ranks. Our own asks the kernel for it, and Slurm ends its tasks itself."""
_NODE_LAUNCHER = "deepspeed.launcher.launch"
_COMMANDS = ("deepspeed", "ds", "deepspeed.pt")
"""Names under which DeepSpeed installs its runner."""


def watch(launcher: str) -> None:
    """Send this process SIGTERM once, when the process that started it, or that one's runner, is no longer there.

    Args:
        launcher: as in `LaunchEnv.launcher`; others than `WATCHED` are not looked at.
    """
    if launcher in WATCHED:
        threading.Thread(target=_wait_for, args=(_alive(os.getppid()),), name="ancestors", daemon=True).start()


def _wait_for(alive: Callable[[], bool]) -> None:
    never = threading.Event()
    while alive():
        never.wait(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _alive(parent: int) -> Callable[[], bool]:
    """Whether the launcher `parent` of this process is there, and its runner where it has one on this machine."""
    words, above = _words(parent), _parent_of(parent)
    node_launcher = _NODE_LAUNCHER in words
    runner = above if node_launcher and _is_runner(_words(above)) else None
    # On several machines shells start the node launchers, each with its number. One without had a runner here.
    lost = node_launcher and runner is None and not any(word.startswith("--node_rank") for word in words)

    def alive() -> bool:
        if lost or os.getppid() != parent:
            return False
        return runner is None or _parent_of(parent) == runner

    return alive


def _is_runner(words: list[str]) -> bool:
    return "deepspeed.launcher.runner" in words or any(Path(word).name in _COMMANDS for word in words[:3])


def _words(pid: int) -> list[str]:
    """The command line of a process; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent_of(pid: int) -> int:
    """Its parent; 0 when it is gone. A name in brackets may hold anything, so the fields are counted after it."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
