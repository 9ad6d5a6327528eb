"""`launch=slurm`: a batch script with one task for each rank, started by srun."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from places import render

from engine.config.load import load
from engine.config.rules import check
from engine.config.schema import Config
from engine.errors import ConfigError, Violation, nearest

TRIALS = "trials.txt"
_TEMPLATES = Path(__file__).with_name("slurm")
_TIMES = (
    r"(?P<m>\d+)",
    r"(?P<h>\d+):(?P<m>[0-5]\d):(?P<s>[0-5]\d)",
    r"(?P<d>\d+)-(?P<h>\d\d):(?P<m>[0-5]\d):(?P<s>[0-5]\d)",
)
_EARLY_S = 60
"""Slurm looks at limits once a minute."""
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def files(cfg: Config, words: list[str], folder: Path) -> dict[str, str]:
    """The batch script, and for an array the file of trials. `words` are the overrides of training.

    Needs `launch.gpus_per_node` and `launch.ranks_per_node` to be filled, and no `violations`.
    """
    launch, slurm, name = cfg.launch, cfg.launch.slurm, script(cfg)
    python, mounts = (sys.executable, []) if slurm.container is None else ("python", _mounts(slurm.container, folder))
    trials = [] if slurm.trials is None else named_trials(cfg, words)
    values = {
        "NAME": shlex.quote(cfg.run.name),
        # Slurm reads a percent sign in a file name as the start of a pattern.
        "FOLDER": shlex.quote(str(folder).replace("%", "%%")),
        "LOGS": shlex.quote(str(folder / "logs")),
        "CWD": shlex.quote(str(Path.cwd())),
        "NODES": str(launch.nodes),
        "RANKS": str(launch.ranks_per_node),
        "GPUS": str(launch.gpus_per_node) if launch.gpus_per_node else None,
        "CPUS": str(slurm.cpus_per_task) if slurm.cpus_per_task else None,
        "TIME": slurm.time,
        "PARTITION": _quoted(slurm.partition),
        "ACCOUNT": _quoted(slurm.account),
        "QOS": _quoted(slurm.qos),
        "WARN_S": str(slurm.warn_s),
        "JOBS": str(slurm.jobs),
        "TRIALS": str(len(trials)),
        "AT_ONCE": str(slurm.trials_at_once),
        "TRIALS_FILE": shlex.quote(str(folder / TRIALS)),
        "EXTRA": "\n".join(f"#SBATCH {line}" for line in slurm.extra) or None,
        "CONTAINER": shlex.join(mounts) or None,
        "PYTHON": shlex.quote(python),
        "WORDS": shlex.join(words),
    }
    made = {name: render(_TEMPLATES / name, values)}
    if trials:
        made[TRIALS] = "".join(f"{shlex.join(trial)}\n" for trial in trials)
    return made


def script(cfg: Config) -> str:
    """Name of the template for this run."""
    if cfg.launch.slurm.trials is not None:
        return "array.sbatch"
    if cfg.launch.slurm.jobs > 1:
        return "chain.sbatch"
    return "multi_node.sbatch" if cfg.launch.nodes > 1 else "single_node.sbatch"


def _quoted(value: str | None) -> str | None:
    return None if value is None else shlex.quote(value)


def _mounts(image: str, folder: Path) -> list[str]:
    here = str(Path.cwd())
    runs = str(folder.parents[1])
    mounts = ",".join(f"{path}:{path}" for path in dict.fromkeys((here, runs)))
    return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={here}"]


def named_trials(cfg: Config, words: list[str]) -> list[list[str]]:
    """The overrides of each trial of the file, with a run name for those that have none."""
    lines = [shlex.split(line, comments=True) for line in Path(cfg.launch.slurm.trials or "").read_text().splitlines()]
    trials = [line for line in lines if line]
    return [
        trial if any(word.startswith("run.name=") for word in trial) else [*trial, f"run.name={cfg.run.name}-{number}"]
        for number, trial in enumerate(trials, start=1)
    ]


def command(cfg: Config, folder: Path) -> list[str]:
    """What submits; it prints the number of the job."""
    return ["sbatch", "--parsable", str(folder / script(cfg))]


def after(cfg: Config, folder: Path, said: str) -> list[str]:
    """How to follow, cancel and resume the job whose number sbatch `said`."""
    job = said.strip().split(";")[0]
    own, many = shlex.quote(str(folder)), script(cfg) in ("array.sbatch", "chain.sbatch")
    logs = f"{own}/logs/*-rank0.log" if many else f"{own}/logs/{job}-rank0.log"
    # A signal ends a task that runs, and the next one would start.
    waiting = f"scancel --state=PENDING {job}; " if many else ""
    return [
        f"follow:  squeue --job {job}; tail -F {logs}",
        f"stop:    {waiting}scancel --signal=TERM {job}   (saves the state first)",
        f"cancel:  scancel {job}   (SIGTERM, and SIGKILL after the KillWait of the cluster)",
        f"resume:  {shlex.join(command(cfg, folder))}",
    ]


def seconds(time: str) -> int | None:
    """A limit that is written MM, HH:MM:SS or D-HH:MM:SS; None when it is written otherwise, or nothing."""
    for form in _TIMES:
        found = re.fullmatch(form, time)
        if found:
            return sum(int(number) * _UNITS[unit] for unit, number in found.groupdict().items()) or None
    return None


def violations(cfg: Config) -> list[Violation]:
    """What Slurm would refuse, or take for something else (534 to 540, 542)."""
    slurm = cfg.launch.slurm
    found = [*_time_violations(cfg), *_count_violations(cfg), *_line_violations(cfg)]
    if slurm.jobs > 1 and slurm.trials is not None:
        rule = f"launch.slurm.trials={slurm.trials} makes an array of trials, each of which goes on by itself"
        found.append(_violation(542, "jobs", slurm.jobs, rule, "Use launch.slurm.jobs=1"))
    if slurm.trials is not None:
        found += _trial_violations(cfg)
    if shutil.which("sbatch") is None:
        if not cfg.launch.dry_run:
            way_out = "Run this where jobs are submitted, or use launch.dry_run=true and copy the script there"
            rule = "sbatch is not found on PATH, so nothing can be submitted from this machine"
            found.append(Violation(code=537, option="launch", value="slurm", rule=rule, way_out=way_out))
    elif slurm.partition is not None:
        found += _partition_violations(slurm.partition)
    return found


def _violation(code: int, name: str, value: object, rule: str, way_out: str) -> Violation:
    return Violation(code=code, option=f"launch.slurm.{name}", value=value, rule=rule, way_out=way_out)


def _time_violations(cfg: Config) -> list[Violation]:
    slurm = cfg.launch.slurm
    limit = seconds(slurm.time)
    if limit is None:
        rule = "not a limit of time: MM, HH:MM:SS or D-HH:MM:SS, more than nothing"
        return [_violation(535, "time", slurm.time, rule, "Use launch.slurm.time=24:00:00 for a day")]
    if slurm.warn_s + _EARLY_S >= limit:
        rule = f"launch.slurm.time={slurm.time} is {limit} s, and it warns up to {_EARLY_S} s early"
        shorter = f"launch.slurm.warn_s={limit // 2}, or " if limit // 2 + _EARLY_S < limit else ""
        way_out = f"Use {shorter}a longer launch.slurm.time"
        return [_violation(536, "warn_s", slurm.warn_s, rule, way_out)]
    return []


def _count_violations(cfg: Config) -> list[Violation]:
    slurm = cfg.launch.slurm
    counts = {"warn_s": slurm.warn_s, "jobs": slurm.jobs, "trials_at_once": slurm.trials_at_once}
    if slurm.cpus_per_task is not None:
        counts["cpus_per_task"] = slurm.cpus_per_task
    # Slurm keeps the seconds of a signal in sixteen bits.
    most = {"warn_s": 65535}
    return [
        _violation(
            534,
            name,
            count,
            f"not in 1..{most[name]}" if name in most else "less than 1",
            f"Use launch.slurm.{name}={max(1, min(count, most.get(name, count)))}",
        )
        for name, count in counts.items()
        if not 1 <= count <= most.get(name, count)
    ]


def _line_violations(cfg: Config) -> list[Violation]:
    slurm = cfg.launch.slurm
    lines = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "container": slurm.container}
    values = [*lines.items(), *(("extra", line) for line in slurm.extra)]
    found = [
        _violation(539, name, repr(value), "a line break would end its line of the script", "Write it in one line")
        for name, value in values
        if value is not None and len(value.splitlines()) > 1
    ]
    return found + [
        _violation(539, "extra", repr(line), "each line is an option of sbatch", "Begin it with a dash: --exclusive")
        for line in slurm.extra
        if not line.startswith("-")
    ]


def _trial_violations(cfg: Config) -> list[Violation]:
    path = cfg.launch.slurm.trials or ""
    way_out = "Write overrides in each line, such as: optim.lr=1e-3 run.name=low"
    try:
        trials = named_trials(cfg, [])
    except (OSError, ValueError) as error:
        return [_violation(540, "trials", path, f"cannot be read: {error}", way_out)]
    if not trials:
        return [_violation(540, "trials", path, "the file holds no trial", way_out)]
    names = [next(word for word in reversed(trial) if word.startswith("run.name=")) for trial in trials]
    twice = sorted({name for name in names if names.count(name) > 1})
    return [
        _violation(540, "trials", path, f"several trials have {name}", "Give each trial a run.name of its own")
        for name in twice
    ]


def trial_errors(cfg: Config, words: list[str], world_size: int) -> list[Violation]:
    """What is wrong with the trials of the file, each composed with `words` and checked on `world_size` ranks (540)."""
    found = []
    for number, trial in enumerate(named_trials(cfg, words), start=1):
        try:
            broken = check(load([*words, *trial]), world_size)
        except ConfigError as error:
            broken = list(error.violations)
        where = f"{cfg.launch.slurm.trials}, trial {number}"
        found += [
            _violation(540, "trials", where, f"{one.option}={one.value}: {one.rule}", one.way_out) for one in broken
        ]
    return found


def _partition_violations(partition: str) -> list[Violation]:
    """Ask the cluster (538). A cluster that does not answer refuses nothing here."""
    try:
        asked = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    known = sorted(set(asked.stdout.split()))
    absent = [name for name in partition.split(",") if name not in known]
    if asked.returncode != 0 or not absent:
        return []
    rule = f"sinfo knows no partition {', '.join(absent)}"
    return [_violation(538, "partition", partition, rule, nearest(absent[0], known))]
