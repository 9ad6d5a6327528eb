"""Check a run, write what starts it, and start it: here, through Slurm or on Kubernetes.

    python launch/submit.py launch=local|slurm|kubernetes [launch.OPTION=VALUE ...] [overrides of training ...]

The overrides are those of `python -m engine.train`. Scripts and manifests go to <run.dir>/<run.name>/launch/; with
launch.dry_run=true that is all. What is submitted sets run.resume=true, so that it can be started again at any time.
"""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from engine.config import entry, rules
from engine.config.derived import writes_checkpoints
from engine.config.enums import Device, LaunchTarget
from engine.config.load import load
from engine.config.overrides import is_file, split
from engine.config.schema import Config
from engine.errors import ConfigError, LaunchError, Violation
from engine.plan import host

FOLDER = "launch"


def main(argv: list[str]) -> int:
    """Exit code: 0 submitted (or written, with launch.dry_run), 2 refused; for launch=local that of the run."""
    cfg = load(argv)
    target = importlib.import_module(cfg.launch.target.name)
    words = training_words(argv, cfg)
    world_size = fill(cfg)
    require(cfg, target, words, world_size)
    if _foreground(cfg):
        words = [*words, *_sized(cfg, world_size)]
    folder = Path(cfg.run.dir).resolve() / cfg.run.name / FOLDER
    for name, text in target.files(cfg, words, folder).items():
        _write(folder / name, text)
        print(f"wrote {folder / name}")
    command = target.command(cfg, folder)
    ranks = f"{cfg.launch.nodes} x {cfg.launch.ranks_per_node} ranks"
    if not writes_checkpoints(cfg) and not _foreground(cfg):
        options = f"checkpoint.every={cfg.checkpoint.every} and train.steps={cfg.train.steps}"
        print(f"{options}: no state is saved, and what is stopped begins anew")
    print(f"{ranks} of {cfg.run.name}, started by:\n  {shlex.join(command)}", flush=True)
    if cfg.launch.dry_run:
        print("launch.dry_run=true: nothing is submitted")
        return 0
    said = ""
    if not _foreground(cfg):
        said = _submit(command)
    for line in target.after(cfg, folder, said):
        print(line, flush=True)
    if _foreground(cfg):
        os.execvp(command[0], command)
    return 0


def _foreground(cfg: Config) -> bool:
    """Whether the command is the run itself: this process becomes it, so that signals reach it."""
    return cfg.launch.target is LaunchTarget.local


def _sized(cfg: Config, world_size: int) -> list[str]:
    """The overrides that make Octant start as many ranks here as `launch` says, on the devices that it says."""
    layout = cfg.parallel
    words = [] if layout.dp else [f"parallel.dp={world_size // (layout.pp * layout.context * layout.tp)}"]
    return [*words, *(["train.device=cpu"] if not cfg.launch.gpus_per_node and cfg.train.device is Device.auto else [])]


def training_words(argv: list[str], cfg: Config) -> list[str]:
    """The overrides without those of `launch`, and with run.resume=true.

    Raises:
        LaunchError: 539 a line break, 543 run.overwrite, which each start would follow.
    """
    given = split(argv).overrides
    words = [word for word in given if not word.lstrip("+~").startswith(("launch=", "launch."))]
    found = [
        Violation(
            code=539,
            option=word.partition("=")[0],
            value=repr(word.partition("=")[2]),
            rule="a line break cannot be passed on in a script",
            way_out="Write the value in one line",
        )
        for word in [*words, f"run.name={cfg.run.name}", f"run.dir={cfg.run.dir}"]
        if len(word.splitlines()) > 1
    ]
    found += [
        Violation(
            code=539,
            option=word.lstrip("+").partition("=")[0],
            value=word.partition("=")[2],
            rule="pods see the files of the image only",
            way_out="Copy it into conf/ before the image is built, and choose it by its name",
        )
        for word in words
        if cfg.launch.target is LaunchTarget.kubernetes and is_file(word.partition("=")[2])
    ]
    if cfg.run.overwrite:
        rule = "what is submitted can be started again, and each start would begin by removing the state"
        way_out = "Use another run.name, or remove the folder of the run first"
        found.append(Violation(code=543, option="run.overwrite", value="true", rule=rule, way_out=way_out))
    if found:
        raise LaunchError(found)
    return [*(word for word in words if not word.startswith("run.resume=")), "run.resume=true"]


def fill(cfg: Config) -> int:
    """Set launch.gpus_per_node and launch.ranks_per_node where they are not given; returns the number of ranks.

    Raises:
        LaunchError: 531 no GPUs are named or seen, 532 the nodes disagree with the layout, 533 more ranks than GPUs,
            534 a count that is out of range.
    """
    launch, layout = cfg.launch, cfg.parallel
    counts = (("nodes", launch.nodes, 1), ("gpus_per_node", launch.gpus_per_node, 0))
    for name, count, least in (*counts, ("ranks_per_node", launch.ranks_per_node, 1)):
        if count is not None and count < least:
            raise LaunchError.of(534, f"launch.{name}", count, f"less than {least}", f"Use launch.{name}={least}")
    launch.gpus_per_node = gpus = _gpus(cfg)
    replica = max(1, layout.pp * layout.context * layout.tp)
    wanted = replica * (layout.dp or 1)
    alone = launch.target is LaunchTarget.local and launch.nodes == 1
    if alone and launch.ranks_per_node is None and layout.dp is not None:
        launch.ranks_per_node = wanted  # GPUs of this machine that the layout leaves over stay idle.
    if gpus:
        launch.ranks_per_node = launch.ranks_per_node or gpus
        if launch.ranks_per_node > gpus:
            rule = f"each rank needs its own GPU, and launch.gpus_per_node is {gpus}"
            way_out = f"Use launch.ranks_per_node={gpus}"
            raise LaunchError.of(533, "launch.ranks_per_node", launch.ranks_per_node, rule, way_out)
    elif launch.ranks_per_node is None:
        if wanted % launch.nodes:
            divisors = [n for n in range(1, launch.nodes) if wanted % n == 0]
            rule = f"the layout needs {wanted} ranks, which {launch.nodes} nodes cannot share evenly"
            raise LaunchError.of(532, "launch.nodes", launch.nodes, rule, f"Use launch.nodes={divisors[-1]}")
        launch.ranks_per_node = wanted // launch.nodes
    world_size = launch.nodes * launch.ranks_per_node
    if world_size % replica or (layout.dp is not None and world_size != wanted):
        degrees = f"pp({layout.pp}) * context({layout.context}) * tp({layout.tp})"
        degrees += f" * dp({layout.dp}) = {wanted}" if layout.dp is not None else f" = {replica}"
        rule = f"{launch.nodes} nodes x {launch.ranks_per_node} ranks = {world_size}, and the layout is {degrees}"
        dp = world_size // replica
        way_out = f"Use parallel.dp={dp}" if world_size % replica == 0 and dp else f"Use a multiple of {replica} ranks"
        raise LaunchError.of(532, "launch.nodes*launch.ranks_per_node", world_size, rule, way_out)
    return world_size


def _gpus(cfg: Config) -> int:
    """GPUs of each node: as given, none on CPUs, else those of this machine (531)."""
    launch, device = cfg.launch, cfg.train.device
    if launch.gpus_per_node == 0 and device is Device.cuda:
        rule = "train.device=cuda asks for GPUs"
        raise LaunchError.of(531, "launch.gpus_per_node", 0, rule, "Use launch.gpus_per_node=8, or train.device=cpu")
    if launch.gpus_per_node and device is Device.cpu:
        rule = "train.device=cpu uses none"
        way_out = "Use launch.gpus_per_node=0, or train.device=auto"
        raise LaunchError.of(531, "launch.gpus_per_node", launch.gpus_per_node, rule, way_out)
    if launch.gpus_per_node is not None or device is Device.cpu:
        return launch.gpus_per_node or 0
    import torch  # Two seconds that only this question needs.

    here = torch.cuda.device_count()
    if not here and (launch.target is not LaunchTarget.local or device is Device.cuda):
        rule = "this machine shows no GPUs to go by"
        way_out = "Give their number, launch.gpus_per_node=8, or train.device=cpu for CPU ranks"
        raise LaunchError.of(531, "launch.gpus_per_node", "null", rule, way_out)
    return here


def require(cfg: Config, target: ModuleType, words: list[str], world_size: int) -> None:
    """Raise `LaunchError` with everything that the rules of training and the target refuse."""
    found = [*rules.check(cfg, world_size), *target.violations(cfg)]
    if not found and cfg.launch.target is LaunchTarget.slurm and cfg.launch.slurm.trials is not None:
        found += target.trial_errors(cfg, words, world_size)
    if not found and cfg.launch.target is LaunchTarget.local:
        host.require(cfg, world_size, world_size)
    if not found and cfg.launch.target is LaunchTarget.kubernetes:
        _require_pod_memory(cfg, target, world_size)
    if found:
        raise LaunchError(found)


def _require_pod_memory(cfg: Config, target: ModuleType, world_size: int) -> None:
    """Refuse what does not fit into the memory of a pod (345, 383), which Kubernetes would kill for it."""
    limit = cfg.launch.kubernetes.memory
    try:
        host.require(cfg, world_size, cfg.launch.ranks_per_node or 1, int(target.memory_bytes(limit) or 0))
    except ConfigError as error:
        more = f", or more than launch.kubernetes.memory={limit}"
        raise LaunchError([replace(one, way_out=one.way_out + more) for one in error.violations]) from error


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        rule = f"{path} cannot be written: {error.strerror}"
        raise LaunchError.of(544, "run.dir", path.parents[2], rule, "Use a run.dir that you may write to") from error


def _submit(command: list[str]) -> str:
    """Run the command; what it said. Raises LaunchError 541 when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        rule = f"cannot be started: {error.strerror}"
        raise LaunchError.of(
            541, "launch", command[0], rule, f"Install {command[0]}, or use launch.dry_run=true"
        ) from error
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split()) or "nothing"
        rule = f"{command[0]} ended with exit code {done.returncode} and said: {said}"
        raise LaunchError.of(541, "launch", shlex.join(command), rule, "Change what it names, then submit again")
    print(done.stdout.strip())
    return done.stdout


if __name__ == "__main__":
    sys.exit(entry.run(lambda: main(sys.argv[1:]), usage=__doc__ or ""))
