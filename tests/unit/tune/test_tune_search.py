"""Grids and reports, with a stand-in for training that takes no time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import sweep
from engine.errors import ConfigError, EngineError, LaunchError
from engine.tune import drive, multirun, records, report, runner, slurm_array
from tests.helpers.searches import PYTHON, install, words

FINE = ("search=coarse_to_fine", "optim.lr=log(1e-5,1e-1)")


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)


def test_every_end_of_a_run_is_on_record_and_the_search_goes_on(tmp_path: Path, capsys: Any) -> None:
    assert multirun.main(words(tmp_path, "optim.lr=1e-3,5.0,6.0,7.0,8.0,9.0,1e-4", "search.jobs=3")) == 0
    trials = records.read(tmp_path / "s")
    names = ["done", "diverged", "done", "out_of_memory", "refused", "failed", "done"]
    assert [trial.status.name for trial in trials] == names
    assert [trial.exit_code for trial in trials] == [0, 0, 0, 1, 2, 1, 0]
    assert trials[0].value == pytest.approx(1 / 8)
    assert trials[5].last_lines == ["Traceback: boom"]
    assert trials[5].values == {"optim.lr": "9.0"}
    # 6.0 was stopped by somebody else, and goes on.
    assert (tmp_path / "s/2/starts").read_text() == "xx"
    shown = capsys.readouterr().out
    assert "\n0    grid   done           0.1250  8/8" in shown


def test_a_search_without_a_single_result_fails(tmp_path: Path) -> None:
    assert multirun.main(words(tmp_path, "optim.lr=8.0,9.0")) == 1
    with pytest.raises(LaunchError, match=r"\[OCT584\] SEARCH_FOLDER=\(no result\): none of its 2 runs has ended well"):
        report.main([str(tmp_path / "s")])


def test_the_same_command_takes_finished_runs_over(tmp_path: Path) -> None:
    for _ in range(2):
        assert multirun.main(words(tmp_path, "optim.lr=1e-3,9.0")) == 0
    assert [(tmp_path / f"s/{number}/starts").read_text() for number in (0, 1)] == ["x", "x"]


def test_another_search_in_the_same_folder_is_refused_or_replaces_it(tmp_path: Path) -> None:
    assert multirun.main(words(tmp_path, "optim.lr=1e-3,1e-4")) == 0
    message = r"\[OCT580\] search.study=s: .*/s holds a search with other values. Use search.study=s-2"
    with pytest.raises(LaunchError, match=message):
        multirun.main(words(tmp_path, "optim.lr=1e-3,1e-5"))
    assert multirun.main(words(tmp_path, "optim.lr=1e-3,1e-5", "run.overwrite=true")) == 0
    assert records.read(tmp_path / "s")[1].values == {"optim.lr": "1e-05"}


def test_two_searches_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "s"
    root.mkdir()
    hold = "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.flock(f,fcntl.LOCK_EX); print(1,flush=True); input()"
    with subprocess.Popen(
        [os.path.realpath("/proc/self/exe"), "-c", hold, str(root / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(LaunchError, match=r"\[OCT588\] search.study=s: another process is searching in"):
            multirun.main(words(tmp_path, "optim.lr=1e-3,1e-4"))
        other.communicate(b"\n")


def test_a_launcher_around_a_search_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"\[OCT585\] -m=\(flag\): a launcher has started this, and every one of its"):
        multirun.main(words(tmp_path, "optim.lr=1e-3,1e-4"))


def test_a_signal_saves_what_is_under_way_and_leaves_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, slow=True)
    argv = words(tmp_path, "optim.lr=1e-3,1e-5,1e-4")
    monkeypatch.setattr(drive.time, "sleep", lambda _: _signal_when(tmp_path / "s/1/metrics.jsonl"))
    assert multirun.main(argv) == 75
    assert [trial.status.name for trial in records.read(tmp_path / "s")] == ["done", "stopped", "waiting"]
    monkeypatch.undo()
    install(tmp_path, monkeypatch)
    assert multirun.main(argv) == 0
    assert [trial.status.name for trial in records.read(tmp_path / "s")] == ["done"] * 3


def _signal_when(metrics: Path) -> None:
    if metrics.is_file() and metrics.stat().st_size:
        os.kill(os.getpid(), signal.SIGTERM)


def test_optuna_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "engine.tune.coarse_to_fine", raising=False)
    with pytest.raises(LaunchError, match=r"\[OCT586\] search.method=coarse_to_fine: it needs the package optuna"):
        multirun.main(words(tmp_path, *FINE))


def test_phases_too_short_for_their_options_are_refused_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[OCT308\] optim.warmup_steps=4: the warm-up is longer than the 2 steps"):
        multirun.main(words(tmp_path, *FINE, "optim.warmup_steps=4"))


SLURM = ("optim.lr=1e-3,1e-4", "launch=slurm", "launch.dry_run=true")


@pytest.fixture
def real_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", PYTHON)


@pytest.mark.usefixtures("real_python")
def test_an_array_gets_a_line_of_words_for_each_run_and_is_submitted(tmp_path: Path, capfd: Any) -> None:
    root = tmp_path / "it's here"
    more = (*SLURM, "data.source='a b'", "launch.slurm.trials_at_once=7")
    assert multirun.main(words(root, *more)) == 0
    lines = (root / "s/words.txt").read_text().splitlines()
    split = subprocess.run(["xargs", "printf", "%s\\n"], input=lines[1], capture_output=True, text=True, check=True)
    assert split.stdout.splitlines() == records.read(root / "s")[1].words
    assert sweep.load(split.stdout.splitlines()).run.dir == str(root / "s")
    said = capfd.readouterr().out
    assert f"2 runs, the words of each on a line of {root / 's/words.txt'}" in said
    assert "sbatch --parsable" in said
    assert "#SBATCH --array=1-2%7" in (root / "s/launch/array.sbatch").read_text()
    assert (root / "s/launch/trials.txt").read_text().splitlines() == lines
    # Those that have ended are left out when the same command goes on.
    finished(root / "s/0")
    assert multirun.main(words(root, *more)) == 0
    assert (root / "s/launch/trials.txt").read_text().splitlines() == lines[1:]
    finished(root / "s/1")
    assert multirun.main(words(root, *more)) == 0
    assert f"no run is left to submit, of 2: python -m engine.tune report {root / 's'}" in capfd.readouterr().out


def finished(run: Path) -> None:
    """What a run leaves when it has ended well."""
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 8, "val_loss": 2.5}) + "\n")
    (run / "summary.json").write_text("{}")


@pytest.mark.usefixtures("real_python")
def test_a_refused_array_leaves_no_search(tmp_path: Path, capfd: Any) -> None:
    assert multirun.main(words(tmp_path, *SLURM, "launch.slurm.time=10:30")) == 2
    assert "[OCT535] launch.slurm.time=10:30" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "s").iterdir()] == [".lock"]
    assert multirun.main(words(tmp_path, *SLURM, "optim.beta2=0.9,0.95")) == 0
    assert multirun.main(words(tmp_path, *SLURM, "optim.beta2=0.9,0.95", "launch.slurm.time=10:30")) == 2
    assert len(records.read(tmp_path / "s")) == 4


@pytest.mark.usefixtures("real_python")
def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "s/checkpoints").mkdir(parents=True)
    with pytest.raises(
        LaunchError, match=r"\[OCT580\] search.study=s: .*/s holds no search but checkpoints. Use search"
    ):
        multirun.main(words(tmp_path, "optim.lr=1e-3,1e-4"))
    (tmp_path / "s/checkpoints").rename(tmp_path / "kept")
    assert multirun.main(words(tmp_path, *SLURM)) == 0
    (tmp_path / "kept").rename(tmp_path / "s/checkpoints")
    assert multirun.main(words(tmp_path, *SLURM, "optim.beta2=0.9,0.95", "run.overwrite=true")) == 0
    assert (tmp_path / "s/checkpoints").is_dir()
    assert len(records.read(tmp_path / "s")) == 4


SQUEUE = """#!/bin/sh
case "$*" in *--jobs=7*) echo 2;; esac
"""


@pytest.mark.usefixtures("real_python")
def test_tasks_of_arrays_are_settled_and_not_submitted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    root = tmp_path / "s"
    assert multirun.main(words(tmp_path, "optim.lr=1e-3,1e-4,2e-4,3e-4,-1.0", *SLURM[1:])) == 0
    assert "4 runs, the words of each" in capfd.readouterr().out
    trials = records.read(root)
    assert [trial.status.name for trial in trials] == ["waiting"] * 4 + ["refused"]
    assert any("optim.lr=-1.0" in line for line in trials[4].last_lines)
    slurm_array.remember(root, "submitted\n7\nfollow: 7\n", trials[:4])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/squeue").write_text(SQUEUE)
    (tmp_path / "bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert slurm_array.queued(root) == {1}
    logs = root / "launch/logs"
    logs.mkdir()
    finished(root / "0")
    (logs / "7-1.code").write_text("0 7\n")
    (logs / "7-3.code").write_text("1 9\n")
    (logs / "9-rank0.log").write_text("gloo: connection closed\n" * 50)
    (logs / "9-rank1.log").write_text("torch.OutOfMemoryError: CUDA out of memory\n" + "Traceback\n" * 50)
    (logs / "7-4.code").write_text("75 10\n")
    capfd.readouterr()
    assert multirun.main(words(tmp_path, "optim.lr=1e-3,1e-4,2e-4,3e-4,-1.0", *SLURM[1:])) == 0
    names = ["done", "waiting", "out_of_memory", "stopped", "refused"]
    assert [trial.status.name for trial in records.read(root)] == names
    said = capfd.readouterr().out
    assert "1 runs are still in the queue, or running" in said
    assert "1 runs, the words of each" in said
    assert (root / "launch/trials.txt").read_text().splitlines() == (root / "words.txt").read_text().splitlines()
    assert "optim.lr=0.0003 " in (root / "words.txt").read_text()


def test_an_array_needs_the_scripts_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multirun, "__file__", str(tmp_path / "engine/tune/multirun.py"))
    with pytest.raises(
        LaunchError, match=r"\[OCT590\] launch=slurm: jobs are submitted by launch/submit.py of a check"
    ):
        multirun.main(words(tmp_path, *SLURM))


def test_gpus_are_shared_out_in_disjoint_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = sweep.load(["search.jobs=2"])
    monkeypatch.setattr(runner, "resolve_device_type", lambda _: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    visible = [place["CUDA_VISIBLE_DEVICES"] for place in runner.slots(cfg)]
    assert visible == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(EngineError, match=r"\[OCT579\] search.jobs=2: this machine shows 1 GPUs .* Use search.jobs=1"):
        runner.slots(cfg)


def test_the_report_has_table_pictures_page_and_experiment(tmp_path: Path, capsys: Any) -> None:
    assert multirun.main(words(tmp_path, "optim.lr=1e-3,1e-4,1e-2,9.0", "optim.beta2=0.9,0.95")) == 0
    capsys.readouterr()
    assert report.main([str(tmp_path / "s")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:4] == ["0", "grid", "done", "0.1250"]
    assert [line.split()[2] for line in shown[7:9]] == ["failed", "failed"]
    assert shown[9] == "importance of optim.lr: 100%"
    for name in ("history.png", "values.png", "curves.png"):
        assert (tmp_path / "s" / name).read_bytes().startswith(b"\x89PNG")
    assert "Traceback: boom" in (tmp_path / "s/report.html").read_text()
    assert (tmp_path / "s/best.yaml").read_text().startswith("# @package _global_\n")
    assert "  lr: 0.001\n  beta2: 0.9\n" in (tmp_path / "s/best.yaml").read_text()


def test_a_folder_without_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"\[OCT583\] SEARCH_FOLDER=.*: it holds no sweep.json, which every search"):
        report.main([str(tmp_path)])


@pytest.mark.usefixtures("real_python")
def test_runs_of_other_jobs_are_found_by_their_folders(tmp_path: Path) -> None:
    assert multirun.main(words(tmp_path, *SLURM)) == 0
    finished(tmp_path / "s/1")
    assert report.main([str(tmp_path / "s")]) == 0
    assert "run 1 (grid): val_loss 2.5" in (tmp_path / "s/best.yaml").read_text()
