"""What a run saves, and when."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import save
from engine.checkpoint.initial import WEIGHTS
from engine.checkpoint.reader import Reader
from engine.checkpoint.retention import CHECKPOINTS, LATEST, complete_steps, step_folder
from engine.config.load import config_hash, from_dict
from engine.dist.context import ParallelContext
from engine.errors import CheckpointError
from engine.optim.state import WEIGHT
from engine.protocols import StepResult
from engine.runtime.reference import ReferenceEngine
from engine.train import checkpoints as module
from engine.train.checkpoints import Checkpoints, Facts, Weights
from engine.train.loop import Cursor, StopRequested
from engine.train.stop import StopSignal
from tests.helpers.models import GPT2, batch_of, config_of, layers_of, noisy_weights

PRINT = "data-1234"
RESULT = StepResult(loss=torch.tensor(1.0), grad_norm=torch.tensor(1.0))


class Trained:
    """A run of `steps` steps in one process, with the hooks that save."""

    def __init__(self, folder: Path, start: Cursor = Cursor(), **changes: Any) -> None:  # noqa: B008
        self.cfg = config_of(GPT2, run__dir=str(folder.parent), **{"checkpoint__asynchronous": False, **changes})
        self.cfg.run.name = folder.name
        self.engine = ReferenceEngine(layers_of(GPT2), noisy_weights(), self.cfg, ParallelContext.single())
        self.facts = Facts(self.engine, self.cfg, PRINT, start)
        self.stop = StopSignal()
        self.checkpoints = Checkpoints(self.engine, self.cfg, folder, self.facts, self.stop)
        self.weights = Weights(self.engine, self.cfg, folder, self.facts)
        self.folder = folder

    def run(self, steps: Sequence[int], losses: dict[int, float] | None = None) -> dict[str, Any]:
        """Take the steps, with these validation losses, and end."""
        self.checkpoints.before_training()
        for step in steps:
            result = self.engine.train_step([batch_of(GPT2, first=10 * step)], 0.01)
            self.facts.write(step, {"loss": float(result.loss)})
            if losses is not None:
                self.facts.write(step, {"val_loss": losses[step]})
            self.checkpoints.after_step(step, result, 0.01, 0.0)
        summary: dict[str, Any] = {}
        self.checkpoints.after_training(summary)
        return summary

    def steps(self) -> list[int]:
        """Of the finished checkpoints."""
        return sorted(int(path.name.removeprefix("step-")) for path in complete_steps(self.folder / CHECKPOINTS))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_there_is_a_checkpoint_every_so_many_steps_and_at_the_end(
    asynchronous: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "checkpoint__every": 2,
        "checkpoint__keep_last": 9,
        "checkpoint__asynchronous": asynchronous,
    }
    run = Trained(tmp_path / "run", train__steps=5, **options)
    summary = run.run(range(1, 6))
    assert run.steps() == [2, 4, 5]
    assert (tmp_path / "run" / CHECKPOINTS / LATEST).read_text() == "step-00000005\n"
    assert summary["checkpoints"] == 3
    assert summary["checkpoint_stall_s"] > 0
    assert f"step 4: checkpoint in {step_folder(tmp_path / 'run', 4)}/" in capsys.readouterr().out
    for step in run.steps():
        Reader(step_folder(tmp_path / "run", step)).verify()


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    run = Trained(tmp_path / "run", train__steps=5, checkpoint__every=1, checkpoint__keep_last=2)
    run.run(range(1, 6), losses={1: 5.0, 2: 1.0, 3: 3.0, 4: float("nan"), 5: 4.0})
    assert run.steps() == [2, 4, 5]


def test_a_checkpoint_says_what_the_run_was(tmp_path: Path) -> None:
    run = Trained(tmp_path / "run", Cursor(step=2, samples=100), train__steps=3, checkpoint__every=3)
    run.run([3], losses={3: float("inf")})
    facts = Reader(step_folder(tmp_path / "run", 3)).manifest.facts
    # One step of micro_batch 2.
    assert (facts["step"], facts["samples"]) == (3, 102)
    assert from_dict(facts["config"], "x") == run.cfg
    assert facts["config_hash"] == config_hash(run.cfg)
    assert facts["grid"] == {"pp": 1, "dp": 1, "cp": 1, "tp": 1}
    assert facts["data"] == {"fingerprint": PRINT}
    assert facts["seeds"] == {"train": run.cfg.train.seed, "data": run.cfg.data.seed}
    assert set(facts["metrics"]) == {"loss", "val_loss"}
    assert facts["metrics"]["val_loss"] == "inf"
    assert facts["environment"]["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["time"].endswith("+00:00")


def test_metrics_are_of_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    facts = Trained(tmp_path / "run").facts
    facts.write(1, {"val_loss": 3.0})
    facts.write(2, {"loss": 2.0})
    assert facts.after(2)["metrics"] == {"loss": 2.0}
    assert facts.after(3)["metrics"] == {}


def test_the_final_weights_are_those_after_the_last_step(tmp_path: Path) -> None:
    run = Trained(tmp_path / "run", train__steps=2, checkpoint__every=2)
    run.run([1, 2])
    run.weights.after_training({})
    state, weights = Reader(step_folder(run.folder, 2)), Reader(run.folder / WEIGHTS)
    assert weights.manifest.step == 2
    assert list(weights.manifest.shapes) == [WEIGHT]
    for name in weights.manifest.shapes[WEIGHT]:
        assert torch.equal(weights.tensor(WEIGHT, name), state.tensor(WEIGHT, name))


def fill_disk(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the disk be full when the next `times` checkpoints want room."""
    usage = namedtuple("usage", "total used free")
    left = iter([1000] * times)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda _: usage(0, 0, next(left, 10**12)))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_a_warning_and_the_next_checkpoint_is_tried(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "warn", said.append)
    fill_disk(monkeypatch, 1)
    run = Trained(tmp_path / "run", train__steps=3, checkpoint__every=1, checkpoint__asynchronous=asynchronous)
    run.run([1, 2, 3])
    assert run.steps() == [2, 3]
    (line,) = said
    assert line.startswith("no checkpoint; training goes on. 1. [OCT635] run.dir=")
    assert "has 1,000 left" in line


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_last_checkpoint_that_cannot_be_written_is_an_error(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = Trained(tmp_path / "run", train__steps=2, checkpoint__every=1, checkpoint__asynchronous=asynchronous)
    run.checkpoints.after_step(1, RESULT, 0.01, 0.0)
    run.checkpoints._settle()
    monkeypatch.setattr(os, "pwrite", no_space)
    run.checkpoints.after_step(2, RESULT, 0.01, 0.0)
    with pytest.raises(CheckpointError, match=r"OCT636.*No space left on device"):
        run.checkpoints.after_training({})
    assert sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()) == [LATEST, "step-00000001"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_told_to_stop_saves_the_step_that_it_has_done(
    number: signal.Signals, asynchronous: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Trained(tmp_path / "run", train__steps=9, checkpoint__every=5, checkpoint__asynchronous=asynchronous)
    before = signal.getsignal(number)
    run.stop.install()
    try:
        run.checkpoints.after_step(1, RESULT, 0.01, 0.0)
        signal.raise_signal(number)
        with pytest.raises(StopRequested, match="stopped after step 2"):
            run.checkpoints.after_step(2, RESULT, 0.01, 0.0)
        run.checkpoints.after_stop(2)
    finally:
        run.stop.restore()
    assert signal.getsignal(number) == before
    assert run.steps() == [2]
    assert f"step 2: ending, as asked by {number.name}" in capsys.readouterr().out


def test_a_run_that_is_told_to_stop_after_its_last_step_ends_as_ever(tmp_path: Path) -> None:
    run = Trained(tmp_path / "run", train__steps=2, checkpoint__every=1)
    run.stop.install()
    try:
        signal.raise_signal(signal.SIGTERM)
        run.checkpoints.after_step(2, RESULT, 0.01, 0.0)
    finally:
        run.stop.restore()
    run.checkpoints.after_training({})
    assert run.steps() == [2]
