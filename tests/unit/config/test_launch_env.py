from __future__ import annotations

import pytest

from engine.config.launch_env import LaunchEnv, read
from engine.errors import LaunchError

MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", **MASTER}


def env_of(launcher: str, local_world_size: int, world_size: int = 8) -> LaunchEnv:
    return LaunchEnv(
        rank=5,
        world_size=world_size,
        local_rank=1,
        local_world_size=local_world_size,
        master_addr="node0",
        master_port=29500,
        launcher=launcher,
    )


@pytest.mark.parametrize(
    "environ",
    [
        {},
        MASTER,
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", **MASTER},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "0", **MASTER},
    ],
    ids=["nothing", "master only", "allocation", "batch shell", "batch shell without tasks", "no tasks"],
)
def test_no_launcher(environ: dict[str, str]) -> None:
    assert read(environ) is None


def test_torchrun() -> None:
    assert read({**TORCH, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}) == env_of("torchrun", 4)


def test_deepspeed_names_the_ranks_of_a_node_otherwise() -> None:
    assert read({**TORCH, "LOCAL_SIZE": "2", "CROSS_RANK": "2", "CROSS_SIZE": "4"}) == env_of("deepspeed", 2)


def test_ranks_of_a_node_not_given_means_all_of_them() -> None:
    assert read(TORCH) == env_of("env", 8)


def test_torchrun_inside_a_slurm_step_wins() -> None:
    assert read({**SLURM, **TORCH, "SLURM_PROCID": "0"}) == env_of("env", 8)


@pytest.mark.parametrize(
    ("more", "local_world_size"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x1),3", "SLURM_NODEID": "1"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "7"}, 7),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "99"}, 7),
        ({}, 7),
    ],
)
def test_srun(more: dict[str, str], local_world_size: int) -> None:
    assert read({**SLURM, **more}) == env_of("slurm", local_world_size, world_size=7)


def test_slurm_without_a_step_is_a_launch_when_the_ranks_can_meet() -> None:
    environ = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    assert read(environ) == env_of("slurm", 7, world_size=7)


def test_variables_of_mpi_that_agree_with_slurm_are_fine() -> None:
    assert read({**SLURM, "PMIX_RANK": "5", "WORLD_SIZE": "7"}) == env_of("slurm", 7, world_size=7)


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key not in names}


CASES = [
    (without(TORCH, "WORLD_SIZE"), 501, "WORLD_SIZE=(not set)", "RANK=5, LOCAL_RANK=1", "torchrun --nproc-per-node"),
    (without(TORCH, "LOCAL_RANK"), 501, "LOCAL_RANK=(not set)", "found RANK=5, WORLD_SIZE=8", "torchrun"),
    (without(TORCH, "MASTER_PORT"), 501, "MASTER_PORT=(not set)", "MASTER_ADDR=node0", "torchrun"),
    ({"RANK": "0"}, 501, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT=(not set)", "found RANK=0", "deepspeed"),
    (without(SLURM, *MASTER), 501, "MASTER_ADDR, MASTER_PORT=(not set)", "SLURM_PROCID=5", "export MASTER_ADDR=$(scon"),
    (without(SLURM, "SLURM_NTASKS"), 501, "SLURM_NTASKS=(not set)", "SLURM_PROCID=5", "Launch with srun"),
    ({**TORCH, "RANK": "two"}, 502, "RANK='two'", "not an integer", "Set RANK to a number"),
    ({**TORCH, "WORLD_SIZE": "-8"}, 502, "WORLD_SIZE='-8'", "not an integer from 0 up", "unset it"),
    ({**SLURM, "SLURM_LOCALID": ""}, 502, "SLURM_LOCALID=''", "not an integer", "Set SLURM_LOCALID to a number"),
    ({**TORCH, "RANK": "8"}, 503, "RANK=8", "WORLD_SIZE=8 has no such rank", "Unset RANK and WORLD_SIZE"),
    ({**TORCH, "LOCAL_WORLD_SIZE": "1"}, 503, "LOCAL_RANK=1", "LOCAL_WORLD_SIZE gives 1 ranks", "Unset LOCAL_RANK"),
    (
        {**TORCH, "LOCAL_WORLD_SIZE": "9"},
        503,
        "LOCAL_WORLD_SIZE=9",
        "more ranks on this node",
        "Unset LOCAL_WORLD_SIZE",
    ),
    ({**TORCH, "MASTER_PORT": "99999"}, 503, "MASTER_PORT=99999", "a port is 1..65535", "Use 29500"),
    ({**SLURM, "WORLD_SIZE": "2"}, 503, "WORLD_SIZE=2", "Slurm says rank 5 of 7", "Unset WORLD_SIZE"),
    ({**SLURM, "OMPI_COMM_WORLD_RANK": "1"}, 503, "OMPI_COMM_WORLD_RANK=1", "Slurm says rank 5", "one launcher only"),
    ({"OMPI_COMM_WORLD_RANK": "0"}, 504, "OMPI_COMM_WORLD_RANK=0", "RANK, WORLD_SIZE and LOCAL_RANK are", "torchrun"),
    ({"PMI_RANK": "1", "PMIX_RANK": "1"}, 504, "PMI_RANK=1", "PMI_RANK, PMIX_RANK set by a launcher", "srun python"),
    ({"MV2_COMM_WORLD_RANK": "1"}, 504, "MV2_COMM_WORLD_RANK=1", "variables are not read", "deepspeed --num_gpus"),
    ({"JOB_COMPLETION_INDEX": "3", **MASTER}, 504, "JOB_COMPLETION_INDEX=3", "variables are not read", "torchrun"),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "PMI_RANK": "2"}, 504, "PMI_RANK=2", "are missing", "srun python"),
]


@pytest.mark.parametrize(("environ", "code", "head", "rule", "way_out"), CASES, ids=[f"{c[1]}-{c[2]}" for c in CASES])
def test_refused(environ: dict[str, str], code: int, head: str, rule: str, way_out: str) -> None:
    with pytest.raises(LaunchError) as caught:
        read(environ)
    (violation,) = caught.value.violations
    assert str(violation).startswith(f"[OCT{code}] {head}: ")
    assert rule in violation.rule
    assert way_out in violation.way_out


def test_all_contradictions_are_named() -> None:
    with pytest.raises(LaunchError) as caught:
        read({**TORCH, "RANK": "9", "MASTER_PORT": "0"})
    assert [violation.option for violation in caught.value.violations] == ["RANK", "MASTER_PORT"]
