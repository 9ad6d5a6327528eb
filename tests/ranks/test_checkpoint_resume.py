"""Whole trainings that are killed, resumed, refused or out of disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.checkpoint.compare import logical_hashes
from engine.checkpoint.reader import Reader
from tests.helpers.command import Done
from tests.helpers.forked import Accident, Training, train

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

STEPS = 8
# The embedding's 263 rows are padded.
MODEL = ("model=gpt_tiny", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.vocab_size=263")
MODEL += ("model.dropout=0.1", "data=random", "data.seq_len=16", "data.vocab_size=263", f"train.steps={STEPS}")
# An eps above the rounding of gradients, which Adam's ratio would make much of where a gradient is almost zero.
MODEL += ("optim.warmup_steps=3", "optim.lr=1e-3", "optim.eps=1e-5", "train.device=cpu", "train.cpu_threads=1")
QUIET = ("train.eval_batches=0", "logging.progress=false", "logging.plot=false", "checkpoint.every=2")
ONE = ("train.micro_batch=4", "train.accum_steps=2")
PIPE = ("parallel.pp=2", "train.micro_batch=2", "train.accum_steps=4")
REPLICAS = ("parallel.dp=2", "zero=z2", "train.micro_batch=2", "train.accum_steps=2")


def words(root: Path, name: str, *more: str) -> list[str]:
    return [*MODEL, *QUIET, f"run.dir={root}", f"run.name={name}", *more]


def rows(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each line of metrics.jsonl."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in found if "loss" in row]


def losses(run: Path) -> list[float]:
    """Of the steps, each of which is there once and in its place."""
    found = rows(run)
    assert [step for step, _, _ in found] == list(range(1, len(found) + 1))
    return [loss for _, loss, _ in found]


def content(root: Path) -> dict[str, bytes]:
    """Every file but the locks'."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def steps_of(run: Path) -> list[int]:
    """Of the complete checkpoints."""
    return sorted(int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/COMPLETE"))


def finished(done: Done) -> Done:
    assert done.exit_code == 0, done
    return done


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `one` on one rank and `pipe` on two have never been interrupted."""
    folder = tmp_path_factory.mktemp("runs")
    finished(train(words(folder, "one", *ONE, "train.eval_batches=1", "train.eval_every=2")))
    finished(train(words(folder, "pipe", *PIPE), 2))
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a run into a folder of this test's own; returns the folder of runs."""

    def made(name: str) -> Path:
        shutil.copytree(root / name, tmp_path / name)
        return tmp_path

    return made


@pytest.mark.parametrize("layout", ["same", "other"])
def test_a_killed_training_ends_as_if_it_had_not_been(layout: str, root: Path) -> None:
    name = f"killed-{layout}"
    killed = train(words(root, name, *PIPE), 2, Accident(step=6, kill=True))
    assert killed.exit_code == -signal.SIGKILL, killed
    run = root / name
    assert len(rows(run)) == 5
    assert steps_of(run)[0] == 2
    more, world = (PIPE, 2) if layout == "same" else (ONE, 1)
    done = finished(train(words(root, name, *more, "run.resume=true"), world))
    assert "going on from" in done.stdout
    wanted = rows(root / "pipe")
    assert losses(run) == (
        [loss for _, loss, _ in wanted] if layout == "same" else pytest.approx(losses(root / "pipe"), rel=1e-5)
    )
    assert steps_of(run) == [4, 6, 8]
    if layout == "same":
        assert rows(run) == wanted
        for part in ("weights", f"checkpoints/step-0000000{STEPS}"):
            assert logical_hashes(Reader(run / part)) == logical_hashes(Reader(root / "pipe" / part)), part
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final_loss"] == rows(run)[-1][1]


def test_a_training_killed_before_its_first_checkpoint_starts_anew(root: Path) -> None:
    killed = train(words(root, "early", *ONE), 1, Accident(step=2, kill=True))
    assert killed.exit_code == -signal.SIGKILL
    finished(train(words(root, "early", *ONE, "run.resume=true")))
    assert losses(root / "early") == losses(root / "one")


def test_resuming_what_has_ended_does_nothing(root: Path) -> None:
    before = content(root / "one")
    done = finished(train(words(root, "one", *ONE, "run.resume=true")))
    assert f"{root / 'one'} has all its {STEPS} steps already: nothing to do" in done.stdout
    assert content(root / "one") == before
    assert "[OCT601]" in train(words(root, "one", *ONE)).stderr


@pytest.mark.parametrize(
    ("code", "changes", "said"),
    [
        (637, ("optim=lion",), "Use the optimizer options of the run that wrote it (optim.name=adamw)"),
        (637, ("optim=sgd", "optim.momentum=0.9"), "it holds exp_avg, exp_avg_sq, weight (optim.name=adamw)"),
        (638, ("model.num_layers=3",), "it belongs to another model"),
        (639, ("model.ffn_size=64",), "has shape [128, 32] there and [64, 32] in this model"),
        (
            640,
            ("data.source=python", "data.max_bytes=20000", "data.valid_fraction=0"),
            "or checkpoint.allow_changed_data=true",
        ),
        (641, ("train.steps=5",), "it has done 8 steps, and train.steps=5: there is nothing left to do"),
    ],
)
def test_another_job_is_refused_and_nothing_changes(
    code: int, changes: tuple[str, ...], said: str, root: Path, copy: Callable[[str], Path]
) -> None:
    runs = copy("one")
    before = content(runs)
    common = [*ONE, "train.steps=10", f"data.cache_dir={root / 'cache'}", "optim.warmup_steps=1", *changes]
    refused = train(words(runs, "one", "run.resume=true", *common))
    assert refused.exit_code == 2, refused
    assert f"[OCT{code}] run.resume=" in refused.stderr
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert content(runs) == before
    loaded = train(words(runs, "new", *common, f"checkpoint.load={runs / 'one'}"))
    assert loaded.exit_code == 2, loaded
    assert f"[OCT{code}] checkpoint.load=" in loaded.stderr
    assert not (runs / "new" / "metrics.jsonl").exists()


def test_other_data_is_allowed_when_one_says_so(root: Path) -> None:
    changed = (
        "data.source=python",
        "data.max_bytes=20000",
        "data.valid_fraction=0",
        f"data.cache_dir={root / 'cache'}",
    )
    more = ("checkpoint.allow_changed_data=true", f"checkpoint.load={root / 'one' / 'checkpoints' / 'step-00000006'}")
    finished(train(words(root, "changed", *ONE, *changed, *more)))
    assert [step for step, _, _ in rows(root / "changed")] == [7, 8]
    assert rows(root / "changed")[0][1] != rows(root / "one")[6][1]


def test_the_samples_do_not_depend_on_the_batch(root: Path) -> None:
    """With a rate of almost zero the loss depends on the samples only: two small batches are one large one."""
    still = ("optim.lr=1e-30", "optim.weight_decay=0", "model.dropout=0", "optim.schedule=constant")
    finished(train(words(root, "large", *ONE, *still)))
    load = f"checkpoint.load={root / 'large' / 'checkpoints' / 'step-00000004'}"
    small = ("parallel.dp=2", "train.micro_batch=1", "train.accum_steps=2", "train.steps=12")
    finished(train(words(root, "small", *small, *still, load), 2))
    found = rows(root / "small")
    assert [step for step, _, _ in found] == list(range(5, 13))
    halves = [loss for _, loss, _ in found]
    pairs = [(first + second) / 2 for first, second in zip(halves[::2], halves[1::2], strict=True)]
    wanted = losses(root / "large")
    assert pairs == pytest.approx(wanted[4:], rel=1e-6)
    assert len({round(loss, 5) for loss in wanted}) == STEPS, "each batch has a loss of its own"
    # Eight steps, of which four read half as much, have read what six large ones read.
    back = f"checkpoint.load={root / 'small' / 'checkpoints' / 'step-00000008'}"
    finished(train(words(root, "back", *ONE, *still, back, "train.steps=10")))
    assert [loss for _, loss, _ in rows(root / "back")] == pytest.approx(wanted[6:], rel=1e-6)


def test_the_last_and_the_best_stay(root: Path, tmp_path: Path) -> None:
    """A rate so high that the validation loss only grows: the first checkpoint is the best."""
    more = ("optim.lr=1.0", "optim.warmup_steps=0", "optim.schedule=constant", "train.eval_batches=1")
    keep = ("train.eval_every=1", "checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    finished(train(words(tmp_path, "kept", *ONE, *more, *keep)))
    found = [json.loads(line) for line in (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()]
    held = {row["step"]: row["val_loss"] for row in found if "val_loss" in row and row["step"]}
    best = min(held, key=lambda step: held[step])
    assert steps_of(tmp_path / "kept") == sorted({best, 3, 6, 7, 8})
    assert best not in (3, 6, 7, 8), "otherwise it shows nothing"
    assert (tmp_path / "kept" / "checkpoints" / "latest").read_text().strip() == "step-00000008"
    assert len(os.listdir(tmp_path / "kept" / "checkpoints")) == 6


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """The first one is still there when the second one is to go on with it."""
    long = words(tmp_path, "shared", *ONE, "train.steps=100000")
    with Training(long, 1) as first:
        while "checkpoint in" not in first.said():
            first.ranks[0].join(0.05)
            assert first.ranks[0].is_alive(), first.said("stderr")
        second = train([*long, "run.resume=true"])
        assert second.exit_code == 2, second
        assert "[OCT604] run.name=shared: another run is writing into" in second.stderr
        assert first.ranks[0].is_alive()


def test_a_run_folder_that_cannot_be_written(copy: Callable[[str], Path]) -> None:
    """Also of root: a file is where the folder of the checkpoints should be."""
    runs = copy("one")
    shutil.rmtree(runs / "one" / "checkpoints")
    (runs / "file").write_text("in the way")
    done = train(words(runs / "file", "new", *ONE))
    assert done.exit_code == 2, done
    assert "[OCT602] run.dir=" in done.stderr
    (runs / "new").mkdir()
    (runs / "new" / "checkpoints").write_text("in the way")
    done = train(words(runs, "new", *ONE))
    assert done.exit_code == 2, done
    assert done.stderr.count("no checkpoint; training goes on. 1. [OCT636] run.dir=") == 3
    assert "[OCT636]" in done.stderr.split("CheckpointError:")[1]
    assert len(losses(runs / "new")) == STEPS
    Reader(runs / "new" / "weights").verify()


def test_in_the_background_or_not_the_bytes_are_the_same(root: Path) -> None:
    finished(train(words(root, "waits", *PIPE, "checkpoint.asynchronous=false"), 2))
    for step in steps_of(root / "pipe"):
        for rank in range(2):
            name = f"checkpoints/step-{step:08d}/rank-{rank:05d}.safetensors"
            assert (root / "waits" / name).read_bytes() == (root / "pipe" / name).read_bytes(), name
    assert rows(root / "waits") == rows(root / "pipe")


def size_of_weights(run: Path) -> int:
    return max(path.stat().st_size for path in (run / "weights").glob("*.safetensors"))


def test_a_disk_that_is_full_for_a_while(root: Path, tmp_path: Path) -> None:
    full = Accident(step=3, file_bytes=2 * size_of_weights(root / "pipe"), until=7)
    done = finished(train(words(tmp_path, "full", *PIPE, "checkpoint.asynchronous=false"), 2, full))
    assert steps_of(tmp_path / "full") == [2, 8]
    assert done.stderr.count("no checkpoint; training goes on. 1. [OCT636] run.dir=") == 2
    assert "File too large" in done.stderr
    assert "checkpoints from before are as they were" in done.stderr
    assert rows(tmp_path / "full") == rows(root / "pipe")
    assert sorted(os.listdir(tmp_path / "full" / "checkpoints")) == ["latest", "step-00000002", "step-00000008"]
    for step in (2, 8):
        Reader(tmp_path / "full" / "checkpoints" / f"step-0000000{step}").verify()


def test_a_disk_that_stays_full(root: Path, tmp_path: Path) -> None:
    """It has room for the weights, which are smaller: they, metrics and summary are there, and the exit code is 2."""
    run = tmp_path / "full"
    whole = run / "checkpoints" / "step-00000004" / "COMPLETE"
    full = Accident(step=6, file_bytes=2 * size_of_weights(root / "pipe"), first=whole)
    done = train(words(tmp_path, "full", *PIPE), 2, full)
    assert done.exit_code == 2, done
    assert done.stderr.count("no checkpoint; training goes on. 1. [OCT636] run.dir=") == 1
    assert "CheckpointError:\n1. [OCT636] run.dir=" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps_of(run) == [2, 4]
    for part in ("weights", "checkpoints/step-00000002", "checkpoints/step-00000004"):
        Reader(run / part).verify()
    assert logical_hashes(Reader(run / "weights")) == logical_hashes(Reader(root / "pipe" / "weights"))
    assert rows(run) == rows(root / "pipe")
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
    resumed = finished(train(words(tmp_path, "full", *PIPE, "run.resume=true"), 2))
    assert f"going on from {whole.parent}: step 4, sample 32" in resumed.stdout
    assert rows(run) == rows(root / "pipe")
    assert steps_of(run) == [4, 6, 8]
