"""Searches: whole ones with Optuna, and small ones with real training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config.load import config_hash, load
from engine.tune import multirun, records, report, runner
from engine.tune.records import Status, Trial
from tests.helpers.command import run_command
from tests.helpers.repo import ROOT
from tests.helpers.searches import install, words

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

FINE = ("search=coarse_to_fine", "optim.lr=log(1e-5,1e-1)")
TINY = ["model=gpt_tiny", "model.num_layers=1", "model.hidden_size=32", "model.num_heads=4", "model.vocab_size=263"]
TINY += ["data=random", "data.seq_len=16", "data.vocab_size=263", "train.device=cpu", "train.cpu_threads=1"]
TINY += ["parallel=single", "train.eval_batches=1", "checkpoint.save_final=false", "logging.plot=false"]


class Killed(BaseException):
    """The search dies."""


def test_coarse_to_fine_narrows_down_and_survives_being_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, more = tmp_path / "s", ("search.trials=9", "search.fine_trials=3", "search.final_seeds=2")
    install(tmp_path, monkeypatch)
    whole = tmp_path / "whole"
    assert multirun.main(words(whole, *FINE, *more)) == 0
    undisturbed = records.read(whole / "s")
    best = report.best_trial(undisturbed, "minimize")
    assert [trial.phase for trial in undisturbed] == ["coarse"] * 4 + ["fine"] * 3 + ["final"] * 2
    assert {trial.phase: trial.steps for trial in undisturbed} == {"coarse": 2, "fine": 4, "final": 8}
    coarse = [trial for trial in undisturbed if trial.phase == "coarse"]
    assert (best.value or 0.0) - 1 / 8 <= min((trial.value or 0.0) - 1 / 2 for trial in coarse) + 1e-9
    seeds = [word for trial in undisturbed for word in trial.words if word.startswith("train.seed=")]
    assert seeds == ["train.seed=1234", "train.seed=1235"]

    start = runner.Runner.start

    def start_or_die(self: runner.Runner, trial: Trial) -> None:
        if trial.number in (2, 6) and not (root / str(trial.number)).exists():
            (root / str(trial.number)).mkdir()
            raise Killed
        start(self, trial)

    with monkeypatch.context() as patch:
        patch.setattr(runner.Runner, "start", start_or_die)
        for _ in range(2):
            with pytest.raises(Killed):
                multirun.main(words(tmp_path, *FINE, *more))
    assert multirun.main(words(tmp_path, *FINE, *more)) == 0
    again = records.read(root)
    assert [(trial.values, trial.value) for trial in again] == [(trial.values, trial.value) for trial in undisturbed]
    assert all((root / str(trial.number) / "starts").read_text() == "x" for trial in again)


def test_runs_without_hope_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, slow=True, slow_from=4)
    more = (
        "search.trials=10",
        "search.fine_trials=0",
        "search.final_seeds=0",
        "search.coarse_steps=1",
        "search.fine_steps=1",
    )
    assert multirun.main(words(tmp_path, *FINE, *more)) == 0
    trials = records.read(tmp_path / "s")
    pruned = [trial for trial in trials if trial.status is Status.pruned]
    assert pruned
    assert all(trial.steps_done < 8 and trial.seconds < 20 for trial in pruned)
    assert {trial.status for trial in trials} == {Status.done, Status.pruned}


def test_a_grid_of_real_runs_records_a_refusal_and_gives_an_experiment(tmp_path: Path, capsys: Any) -> None:
    search = [*TINY, "train.steps=2", "optim.lr=3e-3", "model.num_heads=4,5", f"run.dir={tmp_path}", "search.study=s"]
    done = run_command([sys.executable, "-m", "engine.train", "-m", *search], ROOT, 200)
    assert done.exit_code == 0, done
    good, bad = records.read(tmp_path / "s")
    assert (good.status, bad.status, bad.exit_code) == (Status.done, Status.refused, 2)
    assert any("model.hidden_size" in line for line in bad.last_lines), bad.last_lines
    last = json.loads((tmp_path / "s/0/metrics.jsonl").read_text().splitlines()[-1])
    assert good.value == last["val_loss"]
    assert report.main([str(tmp_path / "s")]) == 0
    assert config_hash(load([f"+experiment={tmp_path / 's/best.yaml'}"])) == config_hash(load(good.words))


def test_a_range_test_draws_its_curve_and_suggests_a_rate_on_it(tmp_path: Path) -> None:
    more = ["--low", "1e-4", "--high", "1", "train.steps=12", f"run.dir={tmp_path}"]
    done = run_command([sys.executable, "-m", "engine.tune", "lr_range", *TINY, *more], ROOT, 200)
    assert done.exit_code == 0, done
    found = json.loads((tmp_path / "lr_range/lr_range.json").read_text())
    assert found["rates"][0] == 1e-4
    assert found["rates"][-1] == pytest.approx(1.0)
    assert len(found["losses"]) == 12
    assert found["suggested"] in found["rates"][:-1]
    assert f"suggested: optim.lr={found['suggested']:.2e}" in done.stdout
    assert (tmp_path / "lr_range/lr_range.png").read_bytes().startswith(b"\x89PNG")
