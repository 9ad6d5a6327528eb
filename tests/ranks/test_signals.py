"""SIGTERM to the top process alone, at any moment and under every launcher: no rank is left, and no state is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.command import clean_env, kill_group, run_command, start_command
from tests.helpers.launchers import LAUNCHERS, family, launcher_params, slurm_env, stop

__all__ = ["slurm_env"]

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(3600)]

RANKS = 2
MOMENTS = int(os.environ.get("OCTANT_CHAOS", "1"))
"""Of each launcher; `make chaos` takes 20."""
JOB = (
    "model=gpt_tiny model.num_layers=2 model.hidden_size=32 model.num_heads=4 model.vocab_size=263 data=random "
    "data.seq_len=16 data.vocab_size=263 optim.warmup_steps=3 optim.lr=1e-3 train.device=cpu train.cpu_threads=1 "
    "train.eval_batches=0 train.micro_batch=2 train.accum_steps=2 parallel.pp=2 "
    "logging.plot=false checkpoint.save_final=false run.resume=true"
)
ENDLESS = "train.steps=100000 checkpoint.every=100000"
END_S = 30


def start(launcher: str, folder: Path, env: dict[str, str], more: str = ENDLESS) -> subprocess.Popen[str]:
    job = f"{LAUNCHERS[launcher].command(RANKS)} {JOB} {more} run.dir={folder} run.name=run"
    return start_command(job, folder, env=clean_env(env))


def reached(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait for the first step, then until `step` is written down."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step "):
            break
    else:
        raise AssertionError(f"it ended before a step\n{''.join(said)}\n{process.stderr and process.stderr.read()}")
    while len(losses(run)) < step:
        assert process.poll() is None, f"it ended before step {step}"
        time.sleep(0.01)


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of the whole lines."""
    text = (run / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("launcher", launcher_params())
def test_sigterm_to_the_top_process_saves_and_leaves_no_orphan(
    launcher: str, moment: int, tmp_path: Path, slurm_env: dict[str, str]
) -> None:
    step = random.Random(f"{launcher} {moment}").randrange(1, 40)
    process = start(launcher, tmp_path, slurm_env)
    try:
        reached(process, tmp_path / "run", step)
        everyone = family(tmp_path)
        assert len(everyone) >= RANKS
        stop(process, launcher, tmp_path, slurm_env)
        _, alive = psutil.wait_procs(everyone, timeout=END_S)
        assert alive == [], f"still there {END_S} s after SIGTERM at step {step}"
        said, errors = process.communicate(timeout=END_S)
    finally:
        kill_group(process)
    assert family(tmp_path) == []
    assert process.returncode == LAUNCHERS[launcher].stopped, errors
    assert "run.resume=true goes on" in said
    done = losses(tmp_path / "run")
    assert [number for number, _ in done] == list(range(1, len(done) + 1))
    assert len(done) >= step
    saved = [path.parent.name for path in tmp_path.glob("run/checkpoints/step-*/COMPLETE")]
    assert [int(name[5:]) for name in saved] == [len(done)]


@pytest.mark.parametrize("launcher", launcher_params())
def test_a_rank_that_is_killed_ends_the_job(launcher: str, tmp_path: Path, slurm_env: dict[str, str]) -> None:
    process = start(launcher, tmp_path, slurm_env)
    try:
        reached(process, tmp_path / "run", 2)
        everyone = family(tmp_path)
        ranks = [one for one in everyone if "1" in (one.environ().get("RANK"), one.environ().get("SLURM_PROCID"))]
        assert ranks
        ranks[-1].kill()
        _, alive = psutil.wait_procs(everyone, timeout=2 * END_S)
        assert alive == []
        assert process.wait(timeout=END_S) not in (0, 75)
    finally:
        kill_group(process)


@pytest.mark.skipif(LAUNCHERS["srun"].missing is not None, reason=str(LAUNCHERS["srun"].missing))
def test_sigterm_to_srun_itself_leaves_no_orphan(tmp_path: Path, slurm_env: dict[str, str]) -> None:
    process = start("srun", tmp_path, slurm_env)
    try:
        reached(process, tmp_path / "run", 2)
        everyone = family(tmp_path)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(everyone, timeout=END_S)
        assert alive == []
        assert process.wait(timeout=END_S) == 128 + signal.SIGKILL
    finally:
        kill_group(process)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launcher_that_is_killed_takes_its_ranks_with_it(launcher: str, tmp_path: Path) -> None:
    """SIGKILL cannot be passed on: the ranks find out themselves, and save."""
    process = start(launcher, tmp_path, {})
    try:
        reached(process, tmp_path / "run", 2)
        everyone = family(tmp_path)
        process.kill()
        _, alive = psutil.wait_procs(everyone, timeout=END_S)
        assert alive == []
    finally:
        kill_group(process)
    assert len(list(tmp_path.glob("run/checkpoints/step-*/COMPLETE"))) == 1


def test_a_stopped_run_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    length = "train.steps=60 checkpoint.every=60"
    whole = run_command(f"python -m engine.train {JOB} {length} run.dir={tmp_path} run.name=whole", tmp_path, 120)
    assert whole.exit_code == 0, whole
    process = start("python", tmp_path, {}, length)
    try:
        reached(process, tmp_path / "run", 3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=END_S)
    finally:
        kill_group(process)
    assert process.returncode == 75
    assert len(losses(tmp_path / "run")) < 60
    again = start("python", tmp_path, {}, length)
    said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
