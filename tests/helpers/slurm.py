"""A real Slurm on this machine: slurmctld and two slurmd with four CPUs each, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.command import Done, clean_env, free_port, run_command

DAEMONS = ("slurmctld", "slurmd")
_CONF = """
ClusterName=octant
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=20
SchedulerParameters=sched_interval=2,batch_sched_delay=0
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
SlurmdSpoolDir={root}/spool-%n
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm)"
    return None if os.geteuid() == 0 else "slurmd needs root"


@dataclass(slots=True)
class Slurm:
    """A running cluster with the nodes n1 and n2."""

    root: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """What commands need to find this cluster."""
        return clean_env({"SLURM_CONF": str(self.root / "slurm.conf"), "OMP_NUM_THREADS": "1"})

    def start(self, name: str) -> None:
        """Start `slurmctld`, or the slurmd of the node `name`."""
        conf = str(self.root / "slurm.conf")
        words = (
            ["slurmctld", "-D", "-i", "-f", conf] if name == "slurmctld" else ["slurmd", "-D", "-N", name, "-f", conf]
        )
        output = (self.root / f"{name}.said").open("wb")
        self.daemons[name] = subprocess.Popen(words, env=self.env, stdout=output, stderr=output, start_new_session=True)

    def run(self, *words: str, more: Mapping[str, str] | None = None, timeout_s: float = 60) -> Done:
        """A command of Slurm, or one that calls some, to its end."""
        return run_command(words, self.root, timeout_s, env=self.env | dict(more or {}))

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says; empty when it is gone."""
        said = self.run("scontrol", "-o", "show", "job", job).stdout.splitlines()
        return dict(word.split("=", 1) for word in said[0].split() if "=" in word) if said else {}

    def until(self, what: str, reached: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait until `reached`; raises `AssertionError` with `what` and the state of the queue after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            if time.monotonic() > deadline:
                logs = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.root.rglob("*.out"))]
                logs += [
                    f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.root.rglob("*rank*.log"))
                ]
                queue = self.run("scontrol", "show", "job").stdout
                raise AssertionError(f"{what}: not after {timeout_s:.0f} s\n{queue}\n" + "\n".join(logs))
            time.sleep(0.2)

    def state(self, job: str) -> str:
        """JobState, such as RUNNING."""
        return self.facts(job).get("JobState", "GONE")

    def ended(self, job: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait for the end of a job; its facts."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        self.until(f"end of job {job}", lambda: self.state(job) not in running, timeout_s)
        return self.facts(job)

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons; what does not end is killed."""
        self.run("scancel", "--full", "--user=root")
        deadline = time.monotonic() + 30
        while self.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
        # A step outlives a slurmd that was killed.
        for process in psutil.process_iter(["name", "environ"]):
            conf = (process.info["environ"] or {}).get("SLURM_CONF")
            if (process.info["name"] or "").startswith("slurmstepd") and conf == str(self.root / "slurm.conf"):
                process.kill()


@contextmanager
def cluster(root: Path) -> Iterator[Slurm]:
    """A cluster whose files lie in `root`, stopped at the end."""
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4" for name in ("n1", "n2")
    )
    (root / "state").mkdir(parents=True)
    for name in ("n1", "n2"):
        (root / f"spool-{name}").mkdir()
    (root / "slurm.conf").write_text(_CONF.format(host=host, port=free_port(), root=root, nodes=nodes))
    slurm = Slurm(root)
    try:
        for name in ("slurmctld", "n1", "n2"):
            slurm.start(name)
        slurm.until("idle nodes", lambda: slurm.run("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"], 60)
        yield slurm
    finally:
        slurm.stop()
