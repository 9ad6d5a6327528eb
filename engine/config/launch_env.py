"""Who am I among the ranks? Reads the variables that torchrun, DeepSpeed's launcher and Slurm's srun set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import LaunchError, Violation

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MASTER = ("MASTER_ADDR", "MASTER_PORT")
_MPI = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")
_HOW_TO_START = (
    "Start with 'torchrun --nproc-per-node=N -m engine.train', 'deepspeed --num_gpus N --module engine.train' "
    "or 'srun python -m engine.train'"
)


@dataclass(frozen=True, slots=True)
class LaunchEnv:
    """This rank's place in the job and where the ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str
    """`torchrun`, `deepspeed`, `slurm`, or `env` when RANK and its companions were set by something else."""


def read(environ: Mapping[str, str]) -> LaunchEnv | None:
    """The launch that `environ` describes, or None when no launcher set any variable.

    Raises `LaunchError`: variables missing (501), not an integer or out of range (502), contradictory (503), or of a
    launcher that Octant does not read (504).
    """
    in_step = "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ
    if all(name in environ for name in _TORCH) or (any(name in environ for name in _TORCH) and not in_step):
        return _from_torch(environ)
    # A batch script's own shell has SLURM_PROCID too, but no step: it is a launch only if the ranks can meet.
    meets = all(name in environ for name in _MASTER)
    if in_step or ("SLURM_PROCID" in environ and meets and environ.get("SLURM_NTASKS", "0") != "0"):
        return _from_slurm(environ)
    foreign = [name for name in (*_MPI, "JOB_COMPLETION_INDEX") if name in environ]
    if foreign:
        raise LaunchError.of(
            504,
            foreign[0],
            environ[foreign[0]],
            f"{', '.join(foreign)} set by a launcher whose variables are not read; RANK, WORLD_SIZE and LOCAL_RANK "
            "are missing",
            _HOW_TO_START,
        )
    return None


def _from_torch(environ: Mapping[str, str]) -> LaunchEnv:
    """torchrun, DeepSpeed and everything else that sets RANK, WORLD_SIZE and LOCAL_RANK."""
    _require(environ, (*_TORCH, *_MASTER), _HOW_TO_START)
    values = _integers(environ, (*_TORCH, "MASTER_PORT"))
    here = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    local_world = _integers(environ, (here,))[here] if here else values["WORLD_SIZE"]
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed" if "CROSS_SIZE" in environ else "env"
    env = LaunchEnv(
        rank=values["RANK"],
        world_size=values["WORLD_SIZE"],
        local_rank=values["LOCAL_RANK"],
        local_world_size=local_world,
        master_addr=environ["MASTER_ADDR"],
        master_port=values["MASTER_PORT"],
        launcher=launcher,
    )
    _check(env, ("RANK", "WORLD_SIZE", "LOCAL_RANK", here or "WORLD_SIZE"))
    return env


def _from_slurm(environ: Mapping[str, str]) -> LaunchEnv:
    """One task of an srun step. Slurm names no meeting point, so the job script exports MASTER_ADDR and MASTER_PORT."""
    slurm = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    _require(
        environ,
        (*slurm, *_MASTER),
        "Launch with srun, which sets SLURM_*; in the job script export "
        "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) and MASTER_PORT=29500",
    )
    values = _integers(environ, (*slurm, "MASTER_PORT"))
    env = LaunchEnv(
        rank=values["SLURM_PROCID"],
        world_size=values["SLURM_NTASKS"],
        local_rank=values["SLURM_LOCALID"],
        local_world_size=_slurm_local_world(environ, values["SLURM_NTASKS"]),
        master_addr=environ["MASTER_ADDR"],
        master_port=values["MASTER_PORT"],
        launcher="slurm",
    )
    _check(env, (*slurm, "SLURM_STEP_TASKS_PER_NODE"))
    doubled = [("WORLD_SIZE", env.world_size), *((name, env.rank) for name in ("RANK", *_MPI))]
    found = [
        Violation(
            code=503,
            option=name,
            value=environ[name],
            rule=f"Slurm says rank {env.rank} of {env.world_size} (SLURM_PROCID, SLURM_NTASKS)",
            way_out=f"Unset {name}, or start the ranks with one launcher only. {_HOW_TO_START}",
        )
        for name, expected in doubled
        if environ.get(name, str(expected)) != str(expected)
    ]
    if found:
        raise LaunchError(found)
    return env


def _slurm_local_world(environ: Mapping[str, str], world_size: int) -> int:
    """Tasks on this node. Slurm writes them per node in runs, such as `4(x2),3`."""
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", per_node):
        counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node) for _ in range(int(times or 1))]
        node = _integers(environ, ("SLURM_NODEID",))["SLURM_NODEID"] if "SLURM_NODEID" in environ else 0
        if node < len(counts):
            return counts[node]
    if "SLURM_NTASKS_PER_NODE" in environ:
        return min(_integers(environ, ("SLURM_NTASKS_PER_NODE",))["SLURM_NTASKS_PER_NODE"], world_size)
    return world_size


def _require(environ: Mapping[str, str], names: tuple[str, ...], way_out: str) -> None:
    """Refuse a launch with only some of its variables set (501)."""
    missing = [name for name in names if name not in environ]
    if missing:
        there = ", ".join(f"{name}={environ[name]}" for name in names if name in environ) or "none of the others"
        raise LaunchError.of(
            501, ", ".join(missing), "(not set)", f"a launch needs {', '.join(names)}; found {there}", way_out
        )


def _integers(environ: Mapping[str, str], names: tuple[str, ...]) -> dict[str, int]:
    """The variables as integers; every one that is not is named (502)."""
    found = [
        Violation(
            code=502,
            option=name,
            value=repr(environ[name]),
            rule="not an integer from 0 up",
            way_out=f"Set {name} to a number, or unset it and let the launcher set it",
        )
        for name in names
        if not re.fullmatch(r"\d+", environ[name].strip())
    ]
    if found:
        raise LaunchError(found)
    return {name: int(environ[name]) for name in names}


def _check(env: LaunchEnv, names: tuple[str, str, str, str]) -> None:
    """Refuse numbers that contradict each other (503); `names` are the variables they came from."""
    rank, world, local_rank, local_world = names
    checks = (
        (env.rank < env.world_size, rank, env.rank, f"{world}={env.world_size} has no such rank"),
        (
            env.local_rank < env.local_world_size,
            local_rank,
            env.local_rank,
            f"{local_world} gives {env.local_world_size} ranks on this node",
        ),
        (
            env.local_world_size <= env.world_size,
            local_world,
            env.local_world_size,
            f"more ranks on this node than in the whole job, {world}={env.world_size}",
        ),
        (0 < env.master_port < 65536, "MASTER_PORT", env.master_port, "a port is 1..65535"),
    )
    found = [
        Violation(
            code=503,
            option=name,
            value=value,
            rule=rule,
            way_out="Use 29500, or another free port"
            if name == "MASTER_PORT"
            else f"Unset {name} and {world} that another job left, or set both to match",
        )
        for ok, name, value, rule in checks
        if not ok
    ]
    if found:
        raise LaunchError(found)
