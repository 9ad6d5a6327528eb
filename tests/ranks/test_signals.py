"""SIGTERM to the top process alone, at any moment and under every launcher: no rank is left, and no state is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.command import free_port, kill_group, run_command, start_command

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]

RANKS = 2
MOMENTS = int(os.environ.get("OCTANT_CHAOS", "2"))
"""Of each launcher; `make chaos` takes 20."""
JOB = (
    "model=gpt_tiny model.num_layers=2 model.hidden_size=32 model.num_heads=4 model.vocab_size=263 data=random "
    "data.seq_len=16 data.vocab_size=263 optim.warmup_steps=3 optim.lr=1e-3 train.device=cpu train.cpu_threads=1 "
    "train.eval_batches=0 train.micro_batch=2 train.accum_steps=2 parallel.pp=2 "
    "logging.plot=false checkpoint.save_final=false run.resume=true"
)
LAUNCHERS = {
    "python": "python -m engine.train",
    "deepspeed": f"deepspeed --num_gpus {RANKS} --master_port {{port}} --module engine.train",
    "torchrun": f"torchrun --standalone --nproc-per-node {RANKS} -m engine.train",
}
END_S = 30


def unshare_works() -> bool:
    words = ["unshare", "-pf", "--mount-proc", "true"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


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
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_the_top_process_saves_and_leaves_no_orphan(launcher: str, moment: int, tmp_path: Path) -> None:
    start = LAUNCHERS[launcher].format(port=free_port())
    step = random.Random(f"{launcher} {moment}").randrange(1, 40)
    job = f"{start} {JOB} train.steps=100000 checkpoint.every=100000 run.dir={tmp_path} run.name=run"
    process = start_command(job, tmp_path)
    try:
        reached(process, tmp_path / "run", step)
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= RANKS
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(below, timeout=END_S)
        assert alive == [], f"still there {END_S} s after SIGTERM at step {step}"
        _, said = process.communicate(timeout=END_S)
    finally:
        kill_group(process)
    # torchrun ends with 1 whatever its ranks end with; DeepSpeed's runner dies by the signal.
    assert process.returncode == {"python": 75, "deepspeed": -signal.SIGTERM, "torchrun": 1}[launcher], said
    done = losses(tmp_path / "run")
    assert [number for number, _ in done] == list(range(1, len(done) + 1))
    assert len(done) >= step
    saved = [path.parent.name for path in tmp_path.glob("run/checkpoints/step-*/COMPLETE")]
    assert [int(name[5:]) for name in saved] == [len(done)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_is_killed_ends_the_job(launcher: str, tmp_path: Path) -> None:
    start = LAUNCHERS[launcher].format(port=free_port())
    process = start_command(
        f"{start} {JOB} train.steps=100000 checkpoint.every=100000 run.dir={tmp_path} run.name=run", tmp_path
    )
    try:
        reached(process, tmp_path / "run", 2)
        below = psutil.Process(process.pid).children(recursive=True)
        ranks = [one for one in below if one.environ().get("RANK") == "1" and "engine.train" in " ".join(one.cmdline())]
        assert ranks
        ranks[-1].kill()
        _, alive = psutil.wait_procs(below, timeout=2 * END_S)
        assert alive == []
        assert process.wait(timeout=END_S) not in (0, 75)
    finally:
        kill_group(process)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launcher_that_is_killed_takes_its_ranks_with_it(launcher: str, tmp_path: Path) -> None:
    """SIGKILL cannot be passed on: the ranks find out themselves, and save."""
    start = LAUNCHERS[launcher].format(port=free_port())
    process = start_command(
        f"{start} {JOB} train.steps=100000 checkpoint.every=100000 run.dir={tmp_path} run.name=run", tmp_path
    )
    try:
        reached(process, tmp_path / "run", 2)
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(below, timeout=END_S)
        assert alive == []
    finally:
        kill_group(process)
    assert len(list(tmp_path.glob("run/checkpoints/step-*/COMPLETE"))) == 1


@pytest.mark.skipif(not unshare_works(), reason="a namespace of processes needs unshare and the right to use it")
def test_python_as_the_first_process_of_a_container_saves_on_sigterm(tmp_path: Path) -> None:
    """The kernel drops signals that a first process has no handler for."""
    job = f"python -m engine.train {JOB} train.steps=100000 checkpoint.every=100000 run.dir={tmp_path} run.name=run"
    process = start_command(f"unshare -pf --mount-proc {job}", tmp_path)
    try:
        reached(process, tmp_path / "run", 3)
        below = psutil.Process(process.pid).children(recursive=True)
        first = psutil.Process(process.pid).children()[0]
        first.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=END_S)
        _, alive = psutil.wait_procs(below, timeout=END_S)
        assert alive == []
    finally:
        kill_group(process)
    assert process.returncode == 75, errors
    assert "run.resume=true goes on" in said


def test_a_stopped_run_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    python = LAUNCHERS["python"]
    whole = run_command(
        f"{python} {JOB} train.steps=60 checkpoint.every=60 run.dir={tmp_path} run.name=whole", tmp_path, 120
    )
    assert whole.exit_code == 0, whole
    job = f"{python} {JOB} train.steps=60 checkpoint.every=60 run.dir={tmp_path} run.name=run"
    process = start_command(job, tmp_path)
    try:
        reached(process, tmp_path / "run", 3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=END_S)
    finally:
        kill_group(process)
    assert process.returncode == 75
    assert len(losses(tmp_path / "run")) < 60
    again = run_command(job, tmp_path, 120)
    assert again.exit_code == 0, again
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
