"""`python -m engine.checkpoint`: what it prints, and its exit codes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.checkpoint import commands
from engine.checkpoint.initial import WEIGHTS
from engine.checkpoint.manifest import COMPLETE
from engine.checkpoint.retention import step_folder
from tests.helpers.checkpoints import draws, facts_of, flip_byte, write_checkpoint
from tests.helpers.models import GPT2, config_of

SHAPES = {"a": (6, 4), "b": (5,), "c": ()}
STATE = {"weight": draws(SHAPES), "exp_avg": draws(SHAPES, 1)}
SHARD = "rank-00001.safetensors"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def octant(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; gives exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = commands.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints and final weights."""
    folder, cfg = tmp_path / "run", config_of(GPT2)
    for step in (5, 10):
        more = {"grid": {"pp": 2, "tp": 1}, "time": "2026-01-02T03:04:05+00:00", "metrics": {"val_loss": 1.5}}
        write_checkpoint(step_folder(folder, step), STATE, facts_of(cfg, step, **more))
    write_checkpoint(folder / WEIGHTS, {"weight": STATE["weight"]}, facts_of(cfg, 12), files=1)
    return folder


def test_inspect_says_what_the_newest_checkpoint_is(run: Path, octant: Run) -> None:
    code, out, err = octant("inspect", run)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[:4] == [
        f"{step_folder(run, 10)}: step 10, sample 80, 2026-01-02T03:04:05+00:00",
        "model gpt2, optimizer adamw, written by 2 ranks of pp2 tp1",
        "val_loss 1.5",
        "optimizer_steps 10.0",
    ]
    assert [line.split() for line in lines[4:-1]] == [
        [kind, name, shape, str(parts), "parts"]
        for kind in STATE
        for name, shape, parts in (("a", "6x4", 2), ("b", "5", 2), ("c", "scalar", 1))
    ]
    assert lines[-1].startswith("6 tensors, ")
    assert lines[-1].endswith(" bytes in 2 files")


def test_inspect_with_hashes(run: Path, octant: Run) -> None:
    code, out, _ = octant("inspect", step_folder(run, 5), "--hashes")
    assert code == 0
    sums = [line.split()[-1] for line in out.splitlines()[4:-1]]
    values = [value for named in STATE.values() for value in named.values()]
    assert sums == [hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in values]


def test_inspect_of_a_run_that_has_only_its_weights(tmp_path: Path, octant: Run) -> None:
    write_checkpoint(tmp_path / "run" / WEIGHTS, {"weight": STATE["weight"]})
    code, out, _ = octant("inspect", tmp_path / "run")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'run' / WEIGHTS}: step 7, sample 56")
    assert "model ?, optimizer ?, written by 2 ranks of ?" in out


def test_weights_do_not_stand_in_for_a_damaged_checkpoint(run: Path, octant: Run) -> None:
    (step_folder(run, 10) / SHARD).unlink()
    code, out, err = octant("inspect", run)
    assert (code, out) == (2, "")
    assert f"[OCT632] FOLDER={step_folder(run, 10)}: it is damaged: {SHARD} is missing" in err


def test_inspect_of_nothing(tmp_path: Path, octant: Run) -> None:
    code, out, err = octant("inspect", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("CheckpointError:\n1. [OCT631] FOLDER=")


def test_verify_reads_all_that_a_run_holds(run: Path, octant: Run) -> None:
    code, out, _ = octant("verify", run)
    assert code == 0
    paths = [step_folder(run, 10), step_folder(run, 5), run / WEIGHTS]
    lines = out.splitlines()
    for path, line in zip(paths, lines, strict=True):
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        assert line.startswith(f"{path}: {size:,} bytes are as they were written, ")


def test_verify_of_one_checkpoint_and_of_weights_alone(run: Path, tmp_path: Path, octant: Run) -> None:
    assert len(octant("verify", step_folder(run, 5))[1].splitlines()) == 1
    (run / WEIGHTS).rename(tmp_path / WEIGHTS)
    code, out, _ = octant("verify", tmp_path)
    assert code == 0
    assert out.startswith(f"{tmp_path / WEIGHTS}: ")


def test_verify_names_the_damage(run: Path, octant: Run) -> None:
    flip_byte(step_folder(run, 5) / SHARD, 300)
    code, out, err = octant("verify", run)
    assert code == 2
    assert [line.split(":")[0] for line in out.splitlines()] == [str(step_folder(run, 10))]
    size = (step_folder(run, 5) / SHARD).stat().st_size
    assert (
        f"[OCT632] FOLDER={step_folder(run, 5)}: it is damaged: {SHARD} has other bytes between 0 and {size:,}" in err
    )


def test_verify_of_nothing(tmp_path: Path, octant: Run) -> None:
    code, _, err = octant("verify", tmp_path / "nowhere")
    assert code == 2
    assert f"[OCT631] FOLDER={tmp_path / 'nowhere'}: it holds no finished checkpoint" in err


def test_diff_of_equal_tensors_is_exit_code_0(run: Path, octant: Run) -> None:
    code, out, _ = octant("diff", step_folder(run, 5), run)
    assert code == 0
    assert out.splitlines() == [
        "numbers.optimizer_steps: 5.0 | 10.0",
        "samples: 40 | 80",
        "step: 5 | 10",
        "6 tensors are equal, 0 differ",
    ]


def test_diff_of_other_tensors_is_exit_code_1(run: Path, tmp_path: Path, octant: Run) -> None:
    other = {kind: {name: value + 1 for name, value in named.items()} for kind, named in STATE.items()}
    write_checkpoint(tmp_path / "other", other, facts_of(config_of(GPT2), 10))
    code, out, _ = octant("diff", run, tmp_path / "other", "--limit", "2")
    lines = out.splitlines()
    assert code == 1
    assert lines[-4].startswith("exp_avg a: 100.00% of it, by up to 1 (values to ")
    assert lines[-2:] == ["and 4 more; --limit shows more", "0 tensors are equal, 6 differ"]
    _, out, _ = octant("diff", run, tmp_path / "other")
    assert "more; --limit" not in out


@pytest.mark.parametrize(("place", "option"), [(0, "FIRST"), (1, "SECOND")])
def test_diff_refuses_what_is_damaged(place: int, option: str, run: Path, octant: Run) -> None:
    flip_byte(step_folder(run, 5) / SHARD, 300)
    paths = [step_folder(run, 10), step_folder(run, 10)]
    paths[place] = step_folder(run, 5)
    code, out, err = octant("diff", *paths)
    assert (code, out) == (2, "")
    assert f"[OCT632] {option}={step_folder(run, 5)}: " in err


def test_a_checkpoint_that_was_not_finished(run: Path, octant: Run) -> None:
    (step_folder(run, 5) / COMPLETE).unlink()
    for command in (["inspect"], ["verify"], ["diff", run]):
        code, _, err = octant(*command, step_folder(run, 5))
        assert code == 2
        assert "it holds no finished checkpoint (COMPLETE is not there)" in err


def test_export_needs_options(tmp_path: Path, octant: Run) -> None:
    write_checkpoint(tmp_path / "run" / WEIGHTS, {"weight": {"a": torch.ones(2)}})
    code, _, err = octant("export", tmp_path / "run", tmp_path / "out")
    assert code == 2
    assert "[OCT110] config=" in err
