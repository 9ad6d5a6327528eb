"""The options of `launch`: where `launch/submit.py` starts a run. Training itself does not read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config.enums import LaunchTarget


@dataclass(slots=True, kw_only=True)
class SlurmConfig:
    """What goes into the batch script."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "24:00:00"
    """Limit of one job, as Slurm writes it: MM, HH:MM:SS or D-HH:MM:SS. A longer run is a chain of jobs."""
    warn_s: int = 300
    """Seconds before the limit at which Slurm warns, so that the state is saved and the job put back into the queue."""
    jobs: int = 1
    """Jobs of the chain that are submitted at once; each waits for the one before and goes on with its state."""
    cpus_per_task: int | None = None
    """Cores of each rank; none: what the cluster gives. Data, CPU optimizers and checkpoints use them."""
    trials: str | None = None
    """File with more overrides in each line, quoted as in a shell: one trial, and one task of an array, for each."""
    trials_at_once: int = 8
    """Trials that may run at the same time."""
    container: str | None = None
    """Image for srun's --container-image (pyxis); none: the environment of the host."""
    extra: list[str] = field(default_factory=list)
    """More lines of #SBATCH, without the word."""


@dataclass(slots=True, kw_only=True)
class KubernetesConfig:
    """What goes into the manifests."""

    image: str | None = None
    """Image that launch/Dockerfile builds, best with its digest."""
    namespace: str = "default"
    trainjob: bool = False
    """A TrainJob of Kubeflow Trainer v2 instead of an Indexed Job, which needs no operator."""
    runs_claim: str | None = None
    """PersistentVolumeClaim for run.dir, which all pods share."""
    data_claim: str | None = None
    """PersistentVolumeClaim with corpora, tokenizers and initial weights: /data in each pod, read-only."""
    cpu: str = "8"
    memory: str = "64Gi"
    shared_memory: str = "16Gi"
    queue: str | None = None
    """LocalQueue of Kueue."""
    wandb_secret: str | None = None
    """Secret with the key WANDB_API_KEY."""
    grace_s: int = 600
    """Seconds between SIGTERM and SIGKILL: longer than a save takes."""
    retries: int = 3
    """Restarts of all pods after failures; refusals are not tried again, and saved stops do not count."""


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    """Machines of a run."""

    target: LaunchTarget = LaunchTarget.local
    nodes: int = 1
    gpus_per_node: int | None = None
    """GPUs of each node, with a rank for each. 0: CPU ranks, `ranks_per_node` of them. None: those of this machine."""
    ranks_per_node: int | None = None
    """Ranks of each node; None: one for each GPU, and on CPUs what one node must take of the layout."""
    dry_run: bool = False
    """Write and print everything, submit nothing."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
