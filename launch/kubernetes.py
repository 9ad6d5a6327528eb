"""Kubernetes: an Indexed Job with a headless Service, or a TrainJob of Kubeflow Trainer v2."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import yaml
from places import render

from engine.config.enums import WandbMode
from engine.config.load import config_hash, load, resolved_yaml
from engine.config.schema import Config
from engine.errors import Violation

PORT = 29500
"""Where rank 0 listens, inside its pod."""
WORKING_DIR = PurePosixPath("/workspace")
DATA = "/data"
"""Where `launch.kubernetes.data_claim` is in a pod."""
MIN_GRACE_S = 30
"""What Kubernetes gives without being asked."""

_TEMPLATES = Path(__file__).parent / "k8s"
_NAME_LENGTH = 40
"""Of the 63 letters of a DNS label, the rest is for what controllers append: -node-0-INDEX-abcde."""
_JOB_LABEL = "batch.kubernetes.io/job-name"
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_CPU = re.compile(r"(\d+(?:\.\d{1,3})?)|(\d+)m")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?")
_UNITS = {unit: 1000**i for i, unit in enumerate(("", "k", "M", "G", "T", "P"))}
_UNITS |= {unit: 1024**i for i, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), start=1)}


def files(cfg: Config, words: list[str], folder: Path) -> dict[str, str]:
    """The manifest, by the name of its template. `words` are the overrides of `engine.train`.

    GPUs and ranks of a node are set in `cfg`.
    """
    name = file_name(cfg)
    return {name: render(_TEMPLATES / name, _places(cfg, words))}


def command(cfg: Config, folder: Path) -> list[str]:
    """What submits. `create` and not `apply`: it refuses a job that is there already instead of changing it."""
    return ["kubectl", "create", "-f", str(folder / file_name(cfg))]


def after(cfg: Config, folder: Path, said: str) -> list[str]:
    """How to follow, stop and go on with the job."""
    file, space = shlex.quote(str(folder / file_name(cfg))), f"-n {cfg.launch.kubernetes.namespace}"
    job = job_name(cfg)
    kind, label = ("trainjob", "jobset.sigs.k8s.io/jobset-name") if _trainjob(cfg) else ("job", _JOB_LABEL)
    return [
        f"follow: kubectl {space} logs -f --prefix --max-log-requests={max(5, cfg.launch.nodes)} -l {label}={job}",
        f"state:  kubectl {space} get {kind}/{job} && kubectl {space} get pods -l {label}={job}",
        f"cancel: kubectl delete -f {file}   (SIGTERM: the state is saved within {cfg.launch.kubernetes.grace_s} s)",
        # Foreground: the old pods have saved and are gone when it returns.
        f"resume: kubectl delete --cascade=foreground --ignore-not-found -f {file} && kubectl create -f {file}",
    ]


def violations(cfg: Config) -> list[Violation]:
    """Everything that the cluster would refuse, or that would lose the run: codes 550 to 558."""
    return [*_missing(cfg), *_quantities(cfg), *_names(cfg), *_numbers(cfg)]


def file_name(cfg: Config) -> str:
    """The manifest in the run folder, named as its template."""
    return "trainjob.yaml" if _trainjob(cfg) else "job.yaml"


def job_name(cfg: Config) -> str:
    """`octant-<run.name>` as a DNS label. What had to be changed or cut gets a hash, so that names stay distinct."""
    slug = re.sub(r"[^a-z0-9]+", "-", cfg.run.name.lower()).strip("-")
    plain = f"octant-{slug}"
    if slug == cfg.run.name and len(plain) <= _NAME_LENGTH:
        return plain
    digest = hashlib.sha256(cfg.run.name.encode()).hexdigest()[:6]
    return f"{plain[: _NAME_LENGTH - 7].rstrip('-')}-{digest}"


def _trainjob(cfg: Config) -> bool:
    return cfg.launch.kubernetes.trainjob


def _places(cfg: Config, words: list[str]) -> dict[str, str | None]:
    """What goes where in the templates; None leaves the line out."""
    launch, chosen, name = cfg.launch, cfg.launch.kubernetes, job_name(cfg)
    pod = f"{name}-node-0-0" if chosen.trainjob else f"{name}-0"
    arguments = [f"--nodes={launch.nodes}", f"--ranks={launch.ranks_per_node}", f"--master={pod}.{name}:{PORT}"]
    arguments += [f"--config-hash={config_hash(load(words))}", "--", *words]
    return {
        "NAME": _quoted(name),
        "NAMESPACE": _quoted(chosen.namespace),
        "CONFIG": resolved_yaml(cfg).rstrip().replace("\n", "\n    "),
        "PORT": str(PORT),
        "QUEUE": _quoted(chosen.queue),
        "NODES": str(launch.nodes),
        "RETRIES": str(chosen.retries),
        "BACKOFF_LIMIT": str(chosen.retries * launch.nodes),
        "GRACE_S": str(chosen.grace_s),
        "IMAGE": _quoted(chosen.image),
        # Kubernetes replaces $(NAME) in arguments, and turns $$ into $.
        "ARGS": "[" + ", ".join(str(_quoted(word.replace("$", "$$"))) for word in arguments) + "]",
        "WANDB_SECRET": _quoted(chosen.wandb_secret),
        "CPU": _quoted(chosen.cpu),
        "MEMORY": _quoted(chosen.memory),
        "GPUS": _quoted(str(launch.gpus_per_node)),
        "RUNS": _quoted(str(WORKING_DIR / cfg.run.dir)),
        "RUNS_CLAIM": _quoted(chosen.runs_claim),
        "DATA": _quoted(DATA) if chosen.data_claim else None,
        "DATA_CLAIM": _quoted(chosen.data_claim),
        "SHARED_MEMORY": _quoted(chosen.shared_memory),
    }


def _quoted(value: str | None) -> str | None:
    """A YAML string that is one line and cannot be read as anything else."""
    if value is None:
        return None
    return str(yaml.safe_dump(value, default_style='"', allow_unicode=True, width=math.inf)).strip()


def _violation(code: int, option: str, value: object, rule: str, way_out: str) -> Violation:
    return Violation(code=code, option=option, value=value, rule=rule, way_out=way_out)


def _missing(cfg: Config) -> Iterator[Violation]:
    chosen = cfg.launch.kubernetes
    if not chosen.image or re.search(r"\s", chosen.image):
        yield _violation(
            550,
            "launch.kubernetes.image",
            chosen.image,
            "the pods need an image that holds Octant",
            "Build launch/Dockerfile, push it, and use launch.kubernetes.image=REGISTRY/octant@sha256:DIGEST",
        )
    if chosen.runs_claim is None:
        yield _violation(
            551,
            "launch.kubernetes.runs_claim",
            None,
            f"run.dir={cfg.run.dir} would end with the pods, and with it every checkpoint",
            "Use launch.kubernetes.runs_claim=CLAIM, a PersistentVolumeClaim that all pods can write (ReadWriteMany)",
        )
    if cfg.logging.wandb is WandbMode.online and chosen.wandb_secret is None:
        yield _violation(
            553,
            "logging.wandb",
            cfg.logging.wandb,
            "the pods have no WANDB_API_KEY",
            "Use launch.kubernetes.wandb_secret=SECRET, a Secret with that key, or logging.wandb=offline",
        )


def cpu_cores(text: str) -> float | None:
    """Cores of a Kubernetes quantity of CPU, such as 8, 0.5 or 500m; None when it is none."""
    found = _CPU.fullmatch(text)
    if not found:
        return None
    return float(found[1]) if found[1] else int(found[2]) / 1000


def memory_bytes(text: str) -> float | None:
    """Bytes of a Kubernetes quantity of memory, such as 64Gi or 500M; None when it is none."""
    found = _MEMORY.fullmatch(text)
    return float(found[1]) * _UNITS[found[2] or ""] if found else None


def _quantities(cfg: Config) -> Iterator[Violation]:
    chosen = cfg.launch.kubernetes
    if not cpu_cores(chosen.cpu):
        rule = "not a quantity of CPU: cores such as 8 or 0.5, or thousandths such as 500m"
        yield _violation(554, "launch.kubernetes.cpu", chosen.cpu, rule, "Use launch.kubernetes.cpu=8")
    for option, default in (("memory", "64Gi"), ("shared_memory", "16Gi")):
        text = getattr(chosen, option)
        if not memory_bytes(text):
            number = re.match(r"[1-9]\d*", text)
            near = f"{number[0]}Gi" if number and "g" in text.lower() else default
            rule = "not a quantity of memory: a number and Ki, Mi, Gi, Ti, Pi, k, M, G, T or P"
            yield _violation(554, f"launch.kubernetes.{option}", text, rule, f"Use launch.kubernetes.{option}={near}")
    memory, shared = memory_bytes(chosen.memory), memory_bytes(chosen.shared_memory)
    if memory and shared and shared > memory:
        yield _violation(
            555,
            "launch.kubernetes.shared_memory",
            chosen.shared_memory,
            f"it counts as memory of the pod, which is limited to {chosen.memory}",
            f"Use at most launch.kubernetes.shared_memory={chosen.memory}, better half of it",
        )


def _names(cfg: Config) -> Iterator[Violation]:
    chosen = cfg.launch.kubernetes
    for option, pattern, what in (
        ("namespace", _LABEL, "a DNS label: at most 63 of a-z, 0-9 and -"),
        ("runs_claim", _SUBDOMAIN, "a DNS name: at most 253 of a-z, 0-9, - and ."),
        ("data_claim", _SUBDOMAIN, "a DNS name: at most 253 of a-z, 0-9, - and ."),
        ("queue", _LABEL, "a DNS label: at most 63 of a-z, 0-9 and -"),
        ("wandb_secret", _SUBDOMAIN, "a DNS name: at most 253 of a-z, 0-9, - and ."),
    ):
        value = getattr(chosen, option)
        if value is not None and not pattern.fullmatch(value):
            near = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")[:63].rstrip("-") or "octant"
            rule = f"not {what}, with a letter or digit at both ends"
            yield _violation(556, f"launch.kubernetes.{option}", value, rule, f"Use launch.kubernetes.{option}={near}")


def _numbers(cfg: Config) -> Iterator[Violation]:
    chosen = cfg.launch.kubernetes
    if chosen.grace_s < MIN_GRACE_S:
        yield _violation(
            557,
            "launch.kubernetes.grace_s",
            chosen.grace_s,
            f"below {MIN_GRACE_S} s, which Kubernetes gives by default, and a save may take longer",
            f"Use launch.kubernetes.grace_s={MIN_GRACE_S} or more",
        )
    if chosen.retries < 0:
        rule = "a number of restarts is at least 0"
        yield _violation(558, "launch.kubernetes.retries", chosen.retries, rule, "Use launch.kubernetes.retries=0")
