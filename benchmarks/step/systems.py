"""Who is measured: Octant and peers, each started as a process that leaves seconds, losses and peak memory behind."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import process
from benchmarks.step.cases import Case
from benchmarks.step.words import Words


@dataclass(frozen=True, slots=True)
class System:
    """`module` is started with `variant`; it needs the packages `needs`. `unavailable`: why it is never started."""

    module: str
    variant: str = ""
    needs: tuple[str, ...] = ()
    zero: bool = False
    """Shards what the overrides of `zero` say; the others hold everything in each replica."""
    unavailable: str = ""


OCTANT = "octant"
ONE_RANK = "octant_one_rank"
"""The first rank of a case with several, alone on one GPU. Its rows are not measurements of the case."""
REFERENCE = "fp32 reference"
SYSTEMS: dict[str, System] = {
    OCTANT: System("engine.train"),
    "plain": System("benchmarks.step.plain", "blocks"),
    "plain_whole": System("benchmarks.step.plain", "whole"),
    "hf": System("benchmarks.step.hf", "compile", ("transformers",)),
    "hf_liger": System("benchmarks.step.hf", "liger", ("transformers", "liger_kernel")),
    "hf_deepspeed": System("benchmarks.step.hf_deepspeed", needs=("transformers", "deepspeed"), zero=True),
    "torchtitan": System("benchmarks.step.torchtitan", needs=("torchtitan",)),
    ONE_RANK: System("engine.study"),
    "megatron": System(
        "",
        unavailable="megatron-core's fast layers are those of Transformer Engine, whose part for torch has no wheel; "
        "its other layers keep attention scores in memory",
    ),
}
PLAIN = ("plain", "plain_whole")


@dataclass(frozen=True, slots=True)
class Record:
    """What a process measured: one value for each step."""

    step_s: list[float]
    losses: list[float]
    peak_memory_gib: float | None
    command: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where processes write, and when they have to be done."""

    folder: Path
    seconds: float


def missing(name: str) -> str | None:
    """Why a system cannot be started here at all; None: it can."""
    system = SYSTEMS[name]
    if system.unavailable:
        return system.unavailable
    absent = [package for package in system.needs if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def gpus_of(name: str, case: Case) -> int:
    """How many GPUs a system of a case runs on."""
    return 1 if name in (ONE_RANK, REFERENCE) else case.gpus


def overrides_of(name: str, words: Words) -> list[str]:
    """What a system of a case is configured with."""
    if name in (OCTANT, ONE_RANK):
        return words.octant
    if name == REFERENCE:
        return words.reference
    return words.sharded if SYSTEMS[name].zero else words.whole


def measure(name: str, case: Case, words: Sequence[str], place: Place, *, profile: bool = False) -> Record | str:
    """Run a system once; its record, or why there is none.

    Args:
        words: overrides, less the name of the run.
        profile: leave `trace_of` behind; `words` say which steps.
    """
    folder = place.folder
    log = folder / "logs" / f"{case.name}_{name.replace(' ', '_')}.log"
    if name in (OCTANT, ONE_RANK):
        here = [f"run.dir={folder / 'runs'}", f"run.name={case.name}", "run.overwrite=true"]
        head = ["engine.train"] if name == OCTANT else ["engine.study", "rank", "--world", str(case.gpus)]
        command = ["-m", *head, *words, "logging.every=1"]
        why = process.run([sys.executable, *command, *here], log, place.seconds, _environment(gpus_of(name, case)))
        run = folder / "runs" / case.name
        return why or _invalid(run) or _of_run(run, _text(command))
    system = SYSTEMS["plain"] if name == REFERENCE else SYSTEMS[name]
    ranks = gpus_of(name, case)
    out = folder / f"{case.name}.json"
    out.unlink(missing_ok=True)
    options = ["--variant", system.variant] if system.variant else []
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    traced = ["--profile", str(_profile_folder(name, case, folder))] if profile else []
    head, tail = [*launch, "-m", system.module], [*options, *words, f"run.name={case.name}"]
    why = process.run([sys.executable, *head, str(out), *traced, *tail], log, place.seconds, _environment(ranks))
    if why is not None:
        return why
    found: dict[str, Any] = json.loads(out.read_text())
    out.unlink()
    return Record(**found, command=_text([*head, "OUT.json", *tail]))


def trace_of(name: str, case: Case, folder: Path) -> Path:
    """The trace of a profiled run of `name`."""
    return _profile_folder(name, case, folder) / "trace.json"


def _profile_folder(name: str, case: Case, folder: Path) -> Path:
    own = name in (OCTANT, ONE_RANK)
    return folder / "runs" / case.name / "profile" if own else folder / "profiles" / case.name / name


def _invalid(run: Path) -> str | None:
    """Why the steps of a rank alone took less time than those among all would; None: they did not."""
    infinite = json.loads((run / "summary.json").read_text()).get("steps_with_infinite_gradients", 0)
    return f"gradients of {infinite} steps were not finite, which is less work" if infinite else None


def _of_run(folder: Path, command: str) -> Record:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "step_s" in line]
    return Record(
        [line["step_s"] for line in lines],
        [line["loss"] for line in lines],
        lines[-1].get("peak_memory_gib"),
        command,
    )


def _text(command: Sequence[str]) -> str:
    return " ".join(["python", *command])


def visible_gpus() -> list[str] | None:
    """GPUs of this machine as CUDA_VISIBLE_DEVICES would name them; None without CUDA, where ranks share the CPU."""
    if not torch.cuda.is_available():
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]


def _environment(ranks: int) -> Mapping[str, str]:
    """As many GPUs as ranks are visible, so that a layout cannot take more; nothing is downloaded."""
    env = dict(os.environ) | {"HF_HUB_OFFLINE": "1"}
    if (gpus := visible_gpus()) is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:ranks])
    return env
