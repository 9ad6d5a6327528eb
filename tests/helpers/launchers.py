"""Every way to start the ranks of one job."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.helpers.command import clean_env, free_port
from tests.helpers.slurm import cluster, missing


def _unshare_missing() -> str | None:
    words = ["unshare", "-pf", "--mount-proc", "true"]
    works = shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0
    return None if works else "a namespace of processes needs unshare and the right to use it"


@dataclass(frozen=True, slots=True)
class Launcher:
    """A command with places for `{ranks}` and `{port}`."""

    start: str
    stopped: int
    """Exit code after SIGTERM, with the state saved."""
    missing: str | None = None
    """Why it cannot be used here."""

    def command(self, ranks: int) -> str:
        return self.start.format(ranks=ranks, port=free_port())


LAUNCHERS = {
    "python": Launcher("python -m engine.train", 75),
    # DeepSpeed's runner dies by the signal; torchrun ends with 1 whatever its ranks end with.
    "deepspeed": Launcher("deepspeed --num_gpus {ranks} --master_port {port} --module engine.train", -signal.SIGTERM),
    "torchrun": Launcher("torchrun --standalone --nproc-per-node {ranks} -m engine.train", 1),
    "srun": Launcher(
        "srun --nodes 1 --ntasks {ranks} --kill-on-bad-exit=1 --export=ALL,MASTER_ADDR=127.0.0.1,MASTER_PORT={port} "
        "python -m engine.train",
        75,
        missing(),
    ),
    # As the first process of a container, to which the kernel passes only signals that it handles.
    "pid1": Launcher("unshare -pf --mount-proc python -m engine.train", 75, _unshare_missing()),
}


def launcher_params() -> list[object]:
    """The names of `LAUNCHERS` for `pytest.mark.parametrize`; those that cannot be used here are skipped."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(launcher.missing is not None, reason=f"{name}: {launcher.missing}"))
        for name, launcher in LAUNCHERS.items()
    ]


@pytest.fixture(scope="module")
def slurm_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variable by which srun finds a cluster; empty where Slurm is missing."""
    if missing() is not None:
        yield {}
        return
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield {"SLURM_CONF": running.env["SLURM_CONF"]}


def stop(process: subprocess.Popen[str], launcher: str, folder: Path, env: dict[str, str]) -> None:
    """SIGTERM to the one process that a user or a kubelet would send it to.

    For srun that is scancel's work: SIGTERM to srun itself makes it kill its tasks (`srun(1)`, SIGNALS).
    """
    if launcher == "srun":
        job = family(folder)[-1].environ()["SLURM_JOB_ID"]
        subprocess.run(["scancel", "--signal=TERM", job], env=clean_env(env), check=True)
    else:
        first = psutil.Process(process.pid)
        (first.children()[0] if launcher == "pid1" else first).send_signal(signal.SIGTERM)


def family(folder: Path) -> list[psutil.Process]:
    """All processes of the job whose run.dir is `folder`, less our own child: those of srun are no children of its own.

    Psutil would take the child's exit code away from `Popen`.
    """
    word = f"run.dir={folder}"
    found = [one for one in psutil.process_iter(["cmdline", "ppid"]) if one.info["ppid"] != os.getpid()]
    return [one for one in found if any(word in arg for arg in one.info["cmdline"] or ())]
