"""Which checkpoints stay."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import retention
from engine.checkpoint.manifest import COMPLETE
from engine.checkpoint.retention import (
    CHECKPOINTS,
    LATEST,
    Kept,
    complete_steps,
    remnants,
    set_aside,
    step_folder,
    superfluous,
    tidy,
)
from engine.config.schema_checkpoint import CheckpointConfig
from tests.helpers.checkpoints import facts_of, write_checkpoint


def gone(losses: dict[int, float], **options: Any) -> list[int]:
    """Steps of the checkpoints that need not stay, in the order of their removal."""
    found = [Kept(Path(str(step)), step, loss) for step, loss in losses.items()]
    return [int(str(path)) for path in superfluous(found, CheckpointConfig(**options))]


UNMEASURED = dict.fromkeys(range(10, 70, 10), math.inf)


def test_the_last_stay() -> None:
    assert gone(UNMEASURED, keep_last=3) == [10, 20, 30]
    assert gone(UNMEASURED, keep_last=1) == [10, 20, 30, 40, 50]
    assert gone(UNMEASURED, keep_last=9) == []
    assert gone({}, keep_last=1) == []


def test_the_order_in_which_they_are_found_does_not_matter() -> None:
    backwards = dict(sorted(UNMEASURED.items(), reverse=True))
    assert gone(backwards, keep_last=2, keep_every=20) == gone(UNMEASURED, keep_last=2, keep_every=20)


def test_multiples_stay_as_well() -> None:
    assert gone(UNMEASURED, keep_last=1, keep_every=30) == [10, 20, 40, 50]


def test_the_best_stay_as_well() -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 4.0}
    assert gone(losses, keep_last=1, keep_best=1) == [10, 30, 40]
    assert gone(losses, keep_last=1, keep_best=2) == [10, 40]
    assert gone(losses, keep_last=1, keep_best=0) == [10, 20, 30, 40]


def test_of_equally_good_ones_the_newest_stays() -> None:
    assert gone({10: 1.0, 20: 1.0, 30: 2.0}, keep_last=1, keep_best=1) == [10]


def test_what_was_not_measured_is_never_the_best() -> None:
    assert gone({10: math.nan, 20: math.inf, 30: 5.0, 40: math.inf}, keep_last=1, keep_best=2) == [10, 20]


def test_only_finished_steps_are_found_newest_first(tmp_path: Path) -> None:
    folder = tmp_path / CHECKPOINTS
    for step in (9, 100, 20, 123_456_789):
        path = step_folder(tmp_path, step)
        path.mkdir(parents=True)
        if step != 20:
            (path / COMPLETE).touch()
    for name in ("step-00000030.partial", "step-00000030.old", "step-30", "other-00000030", "step-00000030x"):
        (folder / name).mkdir()
        (folder / name / COMPLETE).touch()
    assert [path.name for path in complete_steps(folder)] == ["step-123456789", "step-00000100", "step-00000009"]
    assert complete_steps(tmp_path / "nowhere") == []


def saved(run: Path, step: int, **metrics: float | str) -> Path:
    return write_checkpoint(
        step_folder(run, step), {"weight": {"a": torch.ones(4, 2)}}, facts_of(None, step, metrics=metrics)
    )


def tidied(run: Path, **options: Any) -> tuple[list[str], list[str]]:
    """What is left, and what was said."""
    said: list[str] = []
    tidy(run / CHECKPOINTS, CheckpointConfig(**options), said.append)
    return sorted(path.name for path in (run / CHECKPOINTS).iterdir()), said


def names(*steps: int) -> list[str]:
    return [LATEST, *(f"step-{step:08d}" for step in steps)]


def test_old_ones_go_and_latest_names_the_newest(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0)):
        saved(tmp_path, step, val_loss=loss)
    assert tidied(tmp_path, keep_last=1) == (names(2, 4), [])
    assert (tmp_path / CHECKPOINTS / LATEST).read_text() == "step-00000004\n"
    saved(tmp_path, 5)
    assert tidied(tmp_path, keep_last=1) == (names(2, 5), [])
    assert (tmp_path / CHECKPOINTS / LATEST).read_text() == "step-00000005\n"


def test_a_loss_that_is_no_number_is_no_best(tmp_path: Path) -> None:
    saved(tmp_path, 1, val_loss="nan")
    saved(tmp_path, 2, val_loss=2.0)
    saved(tmp_path, 3, val_loss="inf")
    assert tidied(tmp_path, keep_last=1, keep_best=2)[0] == names(2, 3)


@pytest.mark.parametrize("damage", ["manifest", "shard", "size"])
def test_what_cannot_be_read_counts_for_nothing_and_stays(damage: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    broken = saved(tmp_path, 4)
    if damage == "manifest":
        (broken / "manifest.json").write_bytes(b"\xff")
    elif damage == "shard":
        (broken / "rank-00001.safetensors").unlink()
    else:
        (broken / "rank-00001.safetensors").write_bytes(b"")
    # Two whole ones stay beside it, and the newest whole one is the latest.
    assert tidied(tmp_path, keep_last=2) == (names(2, 3, 4), [])
    assert (tmp_path / CHECKPOINTS / LATEST).read_text() == "step-00000003\n"


def test_unfinished_ones_are_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (saved(tmp_path, 2) / COMPLETE).unlink()
    assert tidied(tmp_path, keep_last=1)[0] == names(1, 2)
    assert (tmp_path / CHECKPOINTS / LATEST).read_text() == "step-00000001\n"


def test_a_folder_without_checkpoints_gets_no_latest(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS).mkdir()
    assert tidied(tmp_path) == ([], [])


def test_trouble_is_said_and_what_is_half_gone_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise OSError("device or resource busy")

    for step in (1, 2):
        saved(tmp_path, step)
    monkeypatch.setattr(retention.shutil, "rmtree", busy)
    left, said = tidied(tmp_path, keep_last=1)
    assert said == [f"old checkpoints in {tmp_path / CHECKPOINTS} could not be removed (device or resource busy)"]
    assert left == names(1, 2)
    assert complete_steps(tmp_path / CHECKPOINTS) == [step_folder(tmp_path, 2)]


def test_what_killed_saves_left_goes_up_to_the_newest_finished_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step-00000020", {"weight": {"a": torch.ones(2)}})
    left = ["step-00000010", "step-00000010.partial", "step-00000020.old", "step-00000030.partial", "mine"]
    for name in left:
        (tmp_path / name).mkdir()
    assert {path.name for path in remnants(tmp_path)} == {left[0], left[1], left[2]}


def test_checkpoints_after_the_step_that_a_run_goes_on_from_count_no_more(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        write_checkpoint(tmp_path / f"step-{step:08d}", {"weight": {"a": torch.ones(2)}}, facts_of(step=step))
    assert [path.name for path in set_aside(tmp_path, 20)] == ["step-00000060", "step-00000040"]
    assert [path.name for path in complete_steps(tmp_path)] == ["step-00000020"]
    assert (tmp_path / "step-00000060.set-aside" / COMPLETE).is_file(), "nothing is lost"
    write_checkpoint(tmp_path / "step-00000040", {"weight": {"a": torch.ones(2)}}, facts_of(step=40))
    tidy(tmp_path, CheckpointConfig(keep_last=1, keep_best=0), print)
    assert [path.name for path in complete_steps(tmp_path)] == ["step-00000040"]
