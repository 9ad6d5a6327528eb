"""What a run goes on from, and what it refuses to go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.initial import WEIGHTS
from engine.checkpoint.reader import Reader
from engine.checkpoint.retention import step_folder
from engine.config import Config
from engine.errors import CheckpointError, Violation
from engine.model.layers import logical_tensors
from engine.train import session
from engine.train.checkpoints import beginnings, require_fitting, rewind, shapes_of
from tests.helpers.checkpoints import draws, facts_of, write_checkpoint
from tests.helpers.models import GPT2, config_of, layers_of

PRINT = "data-1234"
STATE = {"weight": draws({"a": (6, 4)})}
SHAPES: dict[str, tuple[int, ...]] = {"a": (6, 4)}


def asked(folder: Path, **changes: Any) -> Config:
    cfg = config_of(GPT2, run__dir=str(folder.parent), **changes)
    cfg.run.name = folder.name
    return cfg


def test_a_new_run_begins_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(step_folder(tmp_path / "run", step), STATE)
    assert beginnings(asked(tmp_path / "run")) == ([], "run.resume")
    assert beginnings(asked(tmp_path / "other", run__resume=True)) == ([], "run.resume")


def test_a_run_that_is_resumed_goes_on_from_its_newest(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (1, 2):
        write_checkpoint(step_folder(run, step), STATE)
        write_checkpoint(step_folder(other, step), STATE)
    found = [step_folder(run, 2), step_folder(run, 1)]
    assert beginnings(asked(run, run__resume=True)) == (found, "run.resume")
    # Its own state comes before that of the run from which it began.
    assert beginnings(asked(run, run__resume=True, checkpoint__load=str(other))) == (found, "run.resume")
    assert beginnings(asked(tmp_path / "new", run__resume=True, checkpoint__load=str(run))) == (
        found,
        "checkpoint.load",
    )
    assert beginnings(asked(other, checkpoint__load=str(step_folder(run, 1)))) == (
        [step_folder(run, 1)],
        "checkpoint.load",
    )


def violation(caught: pytest.ExceptionInfo[CheckpointError]) -> Violation:
    (found,) = caught.value.violations
    return found


def test_a_state_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        beginnings(asked(tmp_path / "run", checkpoint__load=str(tmp_path / "gone")))
    assert (violation(caught).code, violation(caught).option) == (631, "checkpoint.load")


def test_a_run_that_ended_without_checkpoints_is_not_started_anew(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / WEIGHTS, STATE)
    with pytest.raises(CheckpointError) as caught:
        beginnings(asked(tmp_path / "run", run__resume=True))
    found = violation(caught)
    assert str(found).startswith("[OCT642] run.resume=True: ")
    assert f"{tmp_path / 'run'} has ended, with weights and without a checkpoint" in found.rule
    assert "so starting anew would replace them" in found.rule
    assert "Take another run.name, and checkpoint.initial_weights to start from its weights" in found.way_out
    assert beginnings(asked(tmp_path / "run")) == ([], "run.resume")


def fitting(tmp_path: Path, option: str = "checkpoint.load", step: int = 7, **changes: Any) -> None:
    facts = facts_of(asked(tmp_path), step, data={"fingerprint": PRINT})
    reader = Reader(write_checkpoint(tmp_path / "x", STATE, facts), option)
    shapes = changes.pop("shapes", SHAPES)
    require_fitting(reader, asked(tmp_path, **changes), PRINT, shapes, option)


def test_a_checkpoint_of_this_run_fits(tmp_path: Path) -> None:
    fitting(tmp_path, train__steps=8)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"OCT639. checkpoint.load=.*a \(weight\) has shape \[6, 4\] there"):
        fitting(tmp_path, shapes={"a": (6, 5)})


@pytest.mark.parametrize("recorded", [PRINT, None])
def test_a_checkpoint_of_another_corpus_is_refused_unless_that_is_meant(recorded: str | None, tmp_path: Path) -> None:
    data = {} if recorded is None else {"data": {"fingerprint": recorded}}
    reader = Reader(write_checkpoint(tmp_path / "x", STATE, facts_of(None, 7, **data)))
    with pytest.raises(CheckpointError) as caught:
        require_fitting(reader, asked(tmp_path), "data-other", SHAPES, "run.resume")
    found = violation(caught)
    assert (found.code, found.option, found.value) == (640, "run.resume", tmp_path / "x")
    assert f"it was trained on other data (fingerprint {recorded}; corpus, tokenizer and split" in found.rule
    assert "of this run have data-other), so its place in the data, sample 56, means nothing here" in found.rule
    assert "checkpoint.allow_changed_data=true" in found.way_out
    changed = asked(tmp_path, checkpoint__allow_changed_data=True)
    require_fitting(reader, changed, "data-other", SHAPES, "run.resume")


@pytest.mark.parametrize(("option", "step"), [("checkpoint.load", 10), ("checkpoint.load", 11), ("run.resume", 11)])
def test_a_checkpoint_with_nothing_left_to_do_is_refused(option: str, step: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        fitting(tmp_path, option, step, train__steps=10)
    found = violation(caught)
    assert (found.code, found.option) == (641, option)
    assert found.rule == f"it has done {step} steps, and train.steps=10: there is nothing left to do"
    assert found.way_out == f"Use train.steps={step + 1} or more"


def test_a_run_that_was_stopped_after_its_last_step_may_still_write_its_weights(tmp_path: Path) -> None:
    fitting(tmp_path, "run.resume", 10, train__steps=10)


def test_a_finished_run_has_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    cfg = asked(run, run__resume=True, train__steps=10)
    assert not session.is_finished(cfg)
    write_checkpoint(step_folder(run, 9), STATE)
    write_checkpoint(run / WEIGHTS, STATE, facts_of(step=9))
    write_checkpoint(step_folder(run, 10), STATE)
    assert not session.is_finished(cfg), "its weights are those of fewer steps"
    shutil.rmtree(run / WEIGHTS)
    write_checkpoint(run / WEIGHTS, STATE, facts_of(step=10))
    assert session.is_finished(cfg)
    assert f"{run} has all its 10 steps already: nothing to do" in capsys.readouterr().out
    assert not session.is_finished(asked(run, train__steps=10)), "it was not asked to go on"
    assert not session.is_finished(asked(run, run__resume=True, train__steps=11))
    (run / WEIGHTS / "COMPLETE").unlink()
    assert not session.is_finished(cfg), "its weights are still to be written"
    assert session.is_finished(asked(run, run__resume=True, train__steps=10, checkpoint__save_final=False))


def test_steps_that_are_done_again_leave_the_metrics_before_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "val_loss": 9.0}, *({"step": step, "loss": 1.0 / step} for step in range(1, 6))]
    lines = [json.dumps(row) for row in [*rows, {"step": 2, "val_loss": 3.0}]]
    path.write_text("\n".join([*lines, "[1]", '{"loss": 3}', '{"step": null}', '{"step": 1, "lo']))
    rewind(path, 2)
    assert path.read_text() == "".join(f"{line}\n" for line in (*lines[:3], lines[-1]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_without_metrics_has_none_to_drop(tmp_path: Path) -> None:
    rewind(tmp_path / "metrics.jsonl", 2)
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_those_of_the_whole_tensors() -> None:
    shapes = shapes_of(logical_tensors(layers_of(GPT2)))
    assert shapes["embed.tokens.weight"] == (101, 32)
