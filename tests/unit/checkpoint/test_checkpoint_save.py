"""Saving: what is there afterwards, and what is there when it fails."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.commit import PARTIAL, commit
from engine.checkpoint.manifest import COMPLETE, MANIFEST, is_complete, seal
from engine.checkpoint.reader import Reader
from engine.checkpoint.save import Saver
from engine.config import OptimizerName
from engine.dist.context import ParallelContext
from engine.errors import CheckpointError, Violation
from engine.optim.state import WEIGHT
from engine.runtime.reference import ReferenceEngine
from tests.helpers.checkpoints import bands, draws, facts_of, fill, write_checkpoint, write_parts
from tests.helpers.models import GPT2, batch_of, config_of, layers_of, noisy_weights

STATE = {"weight": draws({"a": (6, 4), "b": (5,)})}
MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "background"])


def make_engine(seed: int = 1, name: OptimizerName = OptimizerName.adamw) -> ReferenceEngine:
    """GPT-2 of two blocks in one process; its vocabulary is padded."""
    cfg = config_of(GPT2, optim__name=name)
    return ReferenceEngine(layers_of(GPT2), noisy_weights(seed), cfg, ParallelContext.single())


def train(engine: ReferenceEngine, first: int, steps: int) -> list[float]:
    """Losses of steps from number `first` on."""
    return [float(engine.train_step([batch_of(GPT2, first=10 * n)], 0.05).loss) for n in range(first, first + steps)]


def state_of(engine: ReferenceEngine) -> dict[tuple[str, str], torch.Tensor]:
    return {(slot.kind, slot.piece.logical.name): slot.values.clone() for slot in engine.state().slots}


def refused(saver: Saver, folder: Path) -> Violation:
    with pytest.raises(CheckpointError) as caught:
        saver.save(folder, facts_of())
        saver.wait()
    (violation,) = caught.value.violations
    return violation


@MODES
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(asynchronous: bool, tmp_path: Path) -> None:
    engine = make_engine()
    train(engine, 0, 2)
    saver = Saver(engine, asynchronous=asynchronous)
    done: list[str] = []
    saver.save(tmp_path / "two", {"step": 2, "samples": 4}, lambda: done.append("there"))
    before = state_of(engine)
    # Steps go on while the file is written.
    expected = train(engine, 2, 2)
    saver.close()
    assert done == ["there"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [COMPLETE, MANIFEST, "rank-00000.safetensors"]

    reader, other = Reader(tmp_path / "two"), make_engine(seed=99)
    reader.verify()
    assert reader.manifest.facts["numbers"] == {"optimizer_steps": 2.0}
    fill(other.state().slots, reader, other.ctx)
    other.adopt_state(reader.manifest.facts["numbers"])
    after = state_of(other)
    assert after.keys() == before.keys()
    assert [key for key, value in after.items() if not torch.equal(value, before[key])] == []
    assert len(after) == 3 * len(reader.manifest.shapes[WEIGHT])
    assert train(other, 2, 2) == expected
    final = state_of(engine)
    assert all(torch.equal(value, final[key]) for key, value in state_of(other).items())


def test_padding_is_not_stored(tmp_path: Path) -> None:
    engine = make_engine()
    Saver(engine, asynchronous=False).save(tmp_path / "x", facts_of())
    reader = Reader(tmp_path / "x")
    assert reader.manifest.shapes[WEIGHT]["embed.tokens.weight"] == (101, 32)
    assert reader.tensor(WEIGHT, "embed.tokens.weight").shape == (101, 32)
    held = {slot.piece.logical.name: slot.values for slot in engine.state().slots if slot.kind == WEIGHT}
    assert len(held["embed.tokens.weight"]) == 128 * 32


def test_weights_alone(tmp_path: Path) -> None:
    saver = Saver(make_engine(), asynchronous=False, weights_only=True)
    size = saver.prepare()
    saver.save(tmp_path / "weights", facts_of())
    saver.close()
    reader = Reader(tmp_path / "weights")
    assert list(reader.manifest.shapes) == [WEIGHT]
    assert size == reader.manifest.size - reader.manifest.files[0].header


def test_one_saver_saves_again_and_again(tmp_path: Path) -> None:
    engine = make_engine()
    saver = Saver(engine, asynchronous=True)
    values = {}
    for step in (1, 2, 3):
        train(engine, step, 1)
        values[step] = state_of(engine)[WEIGHT, "final_norm.weight"]
        saver.save(tmp_path / str(step), facts_of(step=step))
        assert saver.stall_s > 0
    saver.close()
    for step, value in values.items():
        assert torch.equal(Reader(tmp_path / str(step)).tensor(WEIGHT, "final_norm.weight"), value)


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))


@MODES
def test_a_disk_that_is_too_small_is_seen_before(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, 5000)
    saver = Saver(make_engine(), asynchronous=asynchronous)
    found = refused(saver, tmp_path / "x")
    size = saver.prepare()
    assert (found.code, found.option, found.value) == (635, "run.dir", tmp_path)
    assert found.rule == f"a checkpoint is {size:,} bytes, and the disk of {tmp_path} has 5,000 left"
    assert found.way_out == "Free space, or point run.dir to a disk with more, or lower checkpoint.keep_last"
    assert list(tmp_path.iterdir()) == []
    # The next one is tried again.
    monkeypatch.undo()
    saver.save(tmp_path / "y", facts_of())
    saver.close()
    Reader(tmp_path / "y").verify()


def no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@MODES
@pytest.mark.parametrize("call", ["pwrite", "write", "fsync", "rename"])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    call: str, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write_checkpoint(tmp_path / "before", STATE)
    saver = Saver(make_engine(), asynchronous=asynchronous)
    monkeypatch.setattr(os, call, no_space)
    found = refused(saver, tmp_path / "x")
    monkeypatch.undo()
    assert (found.code, found.option, found.value) == (636, "run.dir", tmp_path / "x")
    assert found.rule == (
        "it could not be written (rank 0: [Errno 28] No space left on device); checkpoints from before are as they were"
    )
    assert found.way_out.endswith("a disk with more, that all hosts share and this user may write")
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    Reader(before).verify()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("target", ["x", COMPLETE])
def test_a_commit_that_fails_leaves_what_was_there(
    target: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        write_checkpoint(tmp_path / "x", STATE, facts_of(step=1))
    right = os.rename

    def rename(source: Path, to: Path) -> None:
        if to.name == target and source.name != "x.old":
            no_space()
        right(source, to)

    monkeypatch.setattr(os, "rename", rename)
    assert refused(Saver(make_engine(), asynchronous=False), tmp_path / "x").code == 636
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == (["x"] if there else [])
    if there:
        reader = Reader(tmp_path / "x")
        reader.verify()
        assert reader.manifest.step == 1


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = refused(Saver(make_engine(), asynchronous=False), tmp_path / "file" / "x")
    assert found.code == 636
    assert "it could not be written (rank 0: " in found.rule


@pytest.mark.parametrize("complete", [True, False])
def test_a_checkpoint_of_the_same_step_is_replaced(complete: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "x", STATE, facts_of(step=1), files=3)
    if not complete:
        (folder / COMPLETE).unlink()
    write_checkpoint(folder, {"weight": draws({"a": (6, 4)}, 5)}, facts_of(step=2))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    reader = Reader(folder)
    reader.verify()
    assert reader.manifest.step == 2
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]


def test_what_a_killed_save_left_behind_is_not_taken(tmp_path: Path) -> None:
    partial = tmp_path / f"x{PARTIAL}"
    partial.mkdir()
    (partial / "rank-00007.safetensors").write_text("half")
    Saver(make_engine(), asynchronous=False).save(tmp_path / "x", facts_of())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert [path.name for path in (tmp_path / "x").glob("rank-*")] == ["rank-00000.safetensors"]


CRASHES: dict[str, Callable[[Path, Path], bool]] = {
    "before the rename": lambda source, target: source.name.endswith(PARTIAL),
    "before the marker": lambda source, target: target.name == COMPLETE,
}


@pytest.mark.parametrize("crash", CRASHES.values(), ids=CRASHES.keys())
def test_a_process_that_dies_leaves_no_checkpoint(
    crash: Callable[[Path, Path], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = os.rename

    def rename(source: Path, target: Path) -> None:
        if crash(source, target):
            raise KeyboardInterrupt
        right(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "x", STATE)
    assert not is_complete(tmp_path / "x")
    assert not is_complete(tmp_path / f"x{PARTIAL}")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / f"x{PARTIAL}", ignore_errors=True)
    Reader(write_checkpoint(tmp_path / "x", STATE)).verify()


def test_the_marker_seals_the_manifest(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "x", STATE)
    assert (folder / COMPLETE).read_text() == seal((folder / MANIFEST).read_bytes())


def test_parts_that_lack_elements_are_no_checkpoint(tmp_path: Path) -> None:
    partial = tmp_path / f"x{PARTIAL}"
    partial.mkdir()
    parts = bands(STATE, 2)[0]
    file = write_parts(partial / "rank-00000.safetensors", parts)
    shapes = {(part.kind, part.name): part.shape for part in parts}
    with pytest.raises(OSError, match=r"the ranks' parts do not make up \['weight a', 'weight b'\]"):
        commit(tmp_path / "x", facts_of(), [(file, shapes)])
    assert not (tmp_path / "x").exists()
