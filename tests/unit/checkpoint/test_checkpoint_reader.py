"""A checkpoint that is read back, and every way in which one can be damaged."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from engine.checkpoint import manifest as sizes
from engine.checkpoint import reader as module
from engine.checkpoint import shard_file
from engine.checkpoint.initial import is_theirs
from engine.checkpoint.manifest import COMPLETE, MANIFEST
from engine.checkpoint.reader import Reader
from engine.errors import CheckpointError, Violation
from engine.parallel.rectangles import Rectangle
from tests.helpers.checkpoints import draws, flip_byte, rewrite_manifest, write_checkpoint

STATE = {"weight": draws({"a": (13, 7), "b": (5,), "c": ()}), "exp_avg": draws({"a": (13, 7)}, 1)}
SHARD = "rank-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-00000007", STATE, files=3)


def refused(folder: Path) -> Violation:
    """The violation on opening or verifying."""
    with pytest.raises(CheckpointError) as caught:
        Reader(folder, "FOLDER").verify()
    (violation,) = caught.value.violations
    assert f"FOLDER={folder}: " in str(violation)
    return violation


@pytest.mark.parametrize("files", [1, 2, 5])
def test_every_tensor_comes_back_from_all_files(files: int, tmp_path: Path) -> None:
    reader = Reader(write_checkpoint(tmp_path / "x", STATE, files=files))
    for kind, named in STATE.items():
        for name, value in named.items():
            assert torch.equal(reader.tensor(kind, name), value)
            assert reader.manifest.shapes[kind][name] == value.shape
    reader.verify()
    assert reader.damages() == []


def test_any_rectangle_is_read_over_the_parts_that_hold_it(folder: Path) -> None:
    reader, draw = Reader(folder), random.Random(0)
    for _ in range(60):
        top, left = draw.randrange(13), draw.randrange(7)
        bottom, right = draw.randint(top + 1, 13), draw.randint(left + 1, 7)
        out = torch.full((bottom - top, right - left), torch.nan)
        reader.read("weight", "a", Rectangle(top, bottom, left, right), out)
        assert torch.equal(out, STATE["weight"]["a"][top:bottom, left:right])


def test_what_is_read_goes_into_any_dtype_and_stride(folder: Path) -> None:
    out = torch.zeros(7, 20, dtype=torch.float64)
    Reader(folder).read("weight", "a", Rectangle(0, 13, 0, 7), out.T[3:16])
    assert torch.equal(out.T[3:16], STATE["weight"]["a"].double())
    assert not out.T[:3].any()
    assert not out.T[16:].any()


def test_what_is_read_can_be_written_to_without_changing_the_file(folder: Path) -> None:
    before = (folder / SHARD).read_bytes()
    reader = Reader(folder)
    reader.tensor("weight", "a").zero_()
    assert torch.equal(reader.tensor("weight", "a"), STATE["weight"]["a"])
    assert (folder / SHARD).read_bytes() == before


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_a_finished_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = refused(tmp_path / name)
    assert (found.code, found.rule) == (631, "it holds no finished checkpoint (COMPLETE is not there)")
    assert "Name the folder of a checkpoint, such as runs/mine/checkpoints/step-00001000, or of a run" in found.way_out


def test_a_save_that_was_killed_before_its_end(folder: Path) -> None:
    (folder / COMPLETE).unlink()
    assert refused(folder).code == 631


def require_damaged(found: Violation, rule: str) -> None:
    assert (found.code, found.way_out) == (632, "Name an earlier checkpoint, or copy this one again")
    assert found.rule == f"it is damaged: {rule}"


def test_a_manifest_that_is_missing(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    found = refused(folder)
    assert found.code == 632
    assert "manifest.json cannot be read (" in found.rule
    assert "No such file" in found.rule


@pytest.mark.parametrize("file", [MANIFEST, COMPLETE])
def test_a_manifest_that_is_not_the_one_that_was_sealed(file: str, folder: Path) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:-2] + b"}}")
    require_damaged(refused(folder), "manifest.json is not what COMPLETE records")


def test_a_marker_that_is_no_text(folder: Path) -> None:
    (folder / COMPLETE).write_bytes(b"\xff\xfe")
    assert "it is damaged: manifest.json cannot be read (" in refused(folder).rule


def test_a_newer_manifest(folder: Path) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    rewrite_manifest(folder, json.dumps({**raw, "version": 9}).encode())
    assert (refused(folder).code, refused(folder).rule.split(",")[0]) == (633, "manifest.json is of version 9")


def test_a_sealed_manifest_of_somebody_else(folder: Path) -> None:
    rewrite_manifest(folder, b'{"format": "other"}')
    assert refused(folder).code == 634


def test_a_file_that_is_missing(folder: Path) -> None:
    (folder / SHARD).unlink()
    require_damaged(refused(folder), f"{SHARD} is missing")


@pytest.mark.parametrize("change", [-4, 4])
def test_a_file_of_another_size(change: int, folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:change] if change < 0 else content + bytes(change))
    size = len(content)
    require_damaged(refused(folder), f"{SHARD} has {size + change} bytes, manifest.json records {size}")


def test_a_byte_that_is_another_names_its_file_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (sizes, shard_file, module):
        monkeypatch.setattr(place, "BLOCK", 1000)
    folder = write_checkpoint(tmp_path / "x", {"weight": {"a": torch.arange(1000.0)}}, files=2)
    size = (folder / SHARD).stat().st_size
    assert 2000 < size < 3000
    Reader(folder, "FOLDER").verify()
    flip_byte(folder / SHARD, 1999)
    require_damaged(refused(folder), f"{SHARD} has other bytes between 1,000 and 2,000")
    flip_byte(folder / SHARD, size - 1)
    first, second = refused(folder).rule.split("; ")
    assert second == f"{SHARD} has other bytes between 2,000 and {size:,}"
    assert first.endswith("between 1,000 and 2,000")


def test_a_header_that_is_another_is_damage_too(folder: Path) -> None:
    flip_byte(folder / SHARD, 20)
    assert f"{SHARD} has other bytes between 0 and " in refused(folder).rule


def test_each_rank_looks_at_its_part_and_together_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (sizes, shard_file, module):
        monkeypatch.setattr(place, "BLOCK", 500)
    folder = write_checkpoint(tmp_path / "x", {"weight": {"a": torch.arange(1000.0)}}, files=2)
    whole = Reader(folder)
    for path in sorted(folder.glob("*.safetensors")):
        for first in range(0, path.stat().st_size, 500):
            flip_byte(path, first)
    found = [whole.damages(rank, 3) for rank in range(3)]
    assert all(found)
    assert sorted(line for part in found for line in part) == sorted(whole.damages())
    assert len(whole.damages()) == sum(len(file.sha256) for file in whole.manifest.files)
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        whole.verify()


def test_a_file_that_goes_away_while_it_is_checked(folder: Path) -> None:
    reader = Reader(folder)
    (folder / SHARD).unlink()
    assert reader.damages() == [f"{SHARD} cannot be read (No such file or directory)"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["config.json", "model.safetensors"], True),
        (["pytorch_model.bin"], True),
        (["weights/a", "pytorch_model.bin"], False),
        (["checkpoints/step-00000001/a", "optimizer.pt"], False),
        (["COMPLETE", "stray.pkl"], False),
        (["notes.txt"], False),
    ],
)
def test_stray_files_do_not_hide_what_octant_wrote(names: list[str], found: bool, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert is_theirs(tmp_path) is found
