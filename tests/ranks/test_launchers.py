"""One job under every launcher: equal to the last bit, ended as a whole, refused alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.command import Done, clean_env, free_port, kill_group, run_command, start_command
from tests.helpers.launchers import LAUNCHERS, launcher_params, slurm_env

__all__ = ["slurm_env"]

pytestmark = pytest.mark.ranks

RANKS = 4
STEPS = 20
JOB = (
    f"parallel=pp2 parallel.dp=2 zero=z1 train.device=cpu train.steps={STEPS} train.micro_batch=2 train.accum_steps=2 "
    "train.eval_batches=0 data.source=texts data.seq_len=16 data.vocab_size=300 data.valid_fraction=0 "
    "optim.lr=1e-3 checkpoint.save_final=false logging.plot=false"
)
PYTHON = LAUNCHERS["python"].start
DEEPSPEED, TORCHRUN = LAUNCHERS["deepspeed"].start, LAUNCHERS["torchrun"].start

# Imported by every interpreter that finds it on its path: notes the rank, and can make one rank fail at a step.
SITE = """
import os
rank = os.environ.get("RANK")
if rank is not None:
    open(os.path.join(os.environ["NOTES"], "rank" + rank), "w").close()
if rank is not None and rank == os.environ.get("FAIL_RANK"):
    import engine.optim.schedule as schedule
    whole = schedule.learning_rate
    def learning_rate(cfg, step, steps):
        if step == 2:
            raise RuntimeError("planted on rank " + rank)
        return whole(cfg, step, steps)
    schedule.learning_rate = learning_rate
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a small corpus."""
    root = tmp_path_factory.mktemp("launchers")
    (root / "texts").mkdir()
    for i in range(8):
        words = " ".join(f"word{(i * j) % 97}" for j in range(400))
        (root / "texts" / f"{i}.txt").write_text(f"text {i}: {words}\n")
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(SITE)
    return root


def environment(folder: Path, **extra: str) -> dict[str, str]:
    return clean_env({"XDG_CACHE_HOME": str(folder / "cache"), **extra}, path=[folder / "site"])


@pytest.fixture
def env(folder: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a command whose ranks leave a note each in `tmp_path`."""
    return environment(folder, NOTES=str(tmp_path))


def launch(start: str, folder: Path, env: dict[str, str], more: str) -> Done:
    return run_command(f"{start.format(ranks=RANKS, port=free_port())} {JOB} {more}", folder, 200, env=env)


def curve(folder: Path, name: str) -> list[tuple[str, str]]:
    """Loss and gradient norm of every step, as exact hexadecimal numbers."""
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [(float(row["loss"]).hex(), float(row["grad_norm"]).hex()) for row in rows if "loss" in row]


def hash_of(folder: Path, name: str) -> str:
    """The hash of the configuration, as the run has noted it."""
    found: str = json.loads((folder / "runs" / name / "summary.json").read_text())["config_hash"]
    return found


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """The curve of the job started without a launcher."""
    notes = tmp_path_factory.mktemp("notes")
    done = launch(PYTHON, folder, environment(folder, NOTES=str(notes)), "run.name=python")
    assert done.exit_code == 0, str(done)
    assert len(list(notes.iterdir())) == RANKS
    found = curve(folder, "python")
    assert len(found) == STEPS
    assert len(set(found)) == STEPS, "a curve that stands still compares nothing"
    return found


@pytest.mark.parametrize("name", launcher_params()[1:])
def test_every_launcher_gives_the_same_bits(
    name: str, folder: Path, env: dict[str, str], slurm_env: dict[str, str], expected: list[tuple[str, str]]
) -> None:
    # torchrun of old, and DeepSpeed, append this.
    last = "--local_rank=0" if name == "torchrun" else ""
    done = launch(LAUNCHERS[name].start, folder, env | slurm_env, f"run.name={name} {last}")
    assert done.exit_code == 0, str(done)
    assert curve(folder, name) == expected
    assert hash_of(folder, name) == hash_of(folder, "python")


@pytest.mark.parametrize(("name", "start"), [("python", PYTHON), ("deepspeed", DEEPSPEED)])
def test_a_rank_that_raises_ends_the_job(name: str, start: str, folder: Path, env: dict[str, str]) -> None:
    done = launch(start, folder, env | {"FAIL_RANK": "3"}, f"run.name=raises-{name}")
    assert done.exit_code > 0, str(done)
    assert "RuntimeError: planted on rank 3" in done.stderr
    assert not (folder / "runs" / f"raises-{name}" / "summary.json").exists()


@pytest.mark.parametrize(
    ("start", "code", "ranks"),
    [
        (PYTHON, lambda done: done.exit_code, 0),
        (DEEPSPEED, lambda done: done.exit_code, RANKS),
        # torchrun ends with 1 whatever its ranks end with, and reports their code.
        (TORCHRUN, lambda done: int(re.findall(r"exitcode\s*: (\d+)", done.stderr)[-1]), RANKS),
    ],
    ids=["python", "deepspeed", "torchrun"],
)
def test_a_wrong_option_is_refused(
    start: str, code: Callable[[Done], int], ranks: int, folder: Path, env: dict[str, str], tmp_path: Path
) -> None:
    """`python -m engine.train` starts no rank at all; the launchers' ranks end before they meet."""
    done = launch(start, folder, env, "train.setps=3 zero=z2 run.name=refused")
    assert done.exit_code != 0
    assert code(done) == 2, str(done)
    assert done.stderr.count("1. [OCT101] train.setps=3: section train has no option setps") == 1, str(done)
    assert "Nearest: steps" in done.stderr
    assert not (folder / "runs" / "refused").exists()
    assert len(list(tmp_path.iterdir())) <= ranks


def test_ranks_with_another_configuration_are_named(folder: Path, env: dict[str, str]) -> None:
    where = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job = f"{PYTHON} {JOB} parallel=dp parallel.dp=3 run.name=differ"
    ranks = [
        start_command(
            f"{job} optim.lr={2e-3 if rank == 1 else 1e-3}",
            folder,
            env=env | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(3)
    ]
    try:
        stderrs = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            kill_group(rank)
    assert [rank.returncode for rank in ranks] == [2, 2, 2]
    assert "1. [OCT512] config=" in stderrs[0]
    assert "ranks [1] were started with another configuration than rank 0" in stderrs[0]
    assert "Start every rank with the same overrides and conf/ folder" in stderrs[0]
    assert not (folder / "runs" / "differ").exists()
