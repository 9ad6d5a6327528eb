from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.schema import RunConfig
from engine.errors import CheckpointError
from engine.observe.folder import LOCK_FILE, OWNED, open_run_folder, usable_run_folder
from tests.helpers.repo import ROOT


def asked(parent: Path, *, overwrite: bool = False, resume: bool = False) -> RunConfig:
    return RunConfig(name="tiny", dir=str(parent), overwrite=overwrite, resume=resume)


def finished_run(parent: Path, name: str = "tiny") -> Path:
    """A folder as a run leaves it, with a note that the user added."""
    folder = parent / name
    (folder / "profile").mkdir(parents=True)
    (folder / "profile" / "trace.json").write_text("{}")
    for entry in OWNED:
        if entry != "profile":
            (folder / entry).write_text("{}\n")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_fresh_folder_is_made(tmp_path: Path) -> None:
    folder = open_run_folder(asked(tmp_path / "runs"))
    assert folder == tmp_path / "runs" / "tiny"
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


def test_results_are_not_replaced_unasked(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    (tmp_path / "tiny-2").mkdir()
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        open_run_folder(asked(tmp_path))
    message = str(caught.value)
    assert "OCT601" in message
    assert "run.name=tiny:" in message
    assert f"{folder} already holds the results" in message
    assert "run.name=tiny-3" in message
    assert "run.resume=true to go on with it, or run.overwrite=true to replace them" in message
    assert sorted(folder.rglob("*")) == before


def test_a_run_that_is_resumed_keeps_its_results(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    before = sorted(folder.rglob("*"))
    assert usable_run_folder(asked(tmp_path, resume=True)) == folder
    assert sorted(folder.rglob("*")) == before
    assert open_run_folder(asked(tmp_path, resume=True)) == folder
    assert sorted(folder.rglob("*")) == sorted([*before, folder / LOCK_FILE])


def test_a_run_to_resume_that_never_was_begins(tmp_path: Path) -> None:
    assert open_run_folder(asked(tmp_path, resume=True)).is_dir()


def test_checkpoints_are_replaced_with_the_rest(tmp_path: Path) -> None:
    shard = tmp_path / "tiny" / "checkpoints" / "step-00000002" / "rank-00000.safetensors"
    shard.parent.mkdir(parents=True)
    shard.touch()
    folder = open_run_folder(asked(tmp_path, overwrite=True))
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


def test_overwrite_removes_what_octant_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = finished_run(tmp_path)
    other = finished_run(tmp_path, "other")
    assert open_run_folder(asked(tmp_path, overwrite=True)) == folder
    assert sorted(path.name for path in folder.iterdir()) == [LOCK_FILE, "notes.txt"]
    assert (other / "metrics.jsonl").exists()


def test_overwrite_does_not_follow_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep.txt").write_text("mine")
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "profile").symlink_to(elsewhere)
    open_run_folder(asked(tmp_path, overwrite=True))
    assert (elsewhere / "keep.txt").exists()
    assert not (folder / "profile").is_symlink()


def test_a_folder_without_recorded_steps_is_reused(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    (folder / "notes.txt").touch()
    assert open_run_folder(asked(tmp_path)) == folder
    assert (folder / "notes.txt").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(CheckpointError) as caught:
        open_run_folder(asked(tmp_path / "runs"))
    message = str(caught.value)
    assert "OCT602" in message
    assert f"run.dir={tmp_path / 'runs'}:" in message
    assert "cannot be written: Not a directory" in message
    assert "Point run.dir to a folder" in message


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    holder = f"""
from engine.config.schema import RunConfig
from engine.observe.folder import open_run_folder
open_run_folder(RunConfig(name="tiny", dir={str(tmp_path)!r}))
print("held", flush=True)
input()
"""
    command = [sys.executable, "-c", holder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        (tmp_path / "tiny" / "metrics.jsonl").touch()
        with pytest.raises(CheckpointError) as caught:
            open_run_folder(asked(tmp_path, overwrite=True))
        assert "[OCT604] run.name=tiny: another run is writing into" in str(caught.value)
        assert "Use run.name=tiny-2, or wait for it to end" in str(caught.value)
        assert (tmp_path / "tiny" / "metrics.jsonl").exists(), "its results are not touched"
        process.communicate("\n")
    open_run_folder(asked(tmp_path, overwrite=True))
