"""Checkpoints in an object store: what is there is whole or does not count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint.manifest import COMPLETE, MANIFEST
from engine.checkpoint.mirror import Mirror
from engine.checkpoint.reader import Reader
from engine.errors import CheckpointError
from tests.helpers.checkpoints import flip_byte, write_checkpoint

TENSORS = {"weight": {"a": torch.arange(12.0).view(4, 3), "b": torch.ones(5)}}


def checkpoint(root: Path, step: int) -> Path:
    folder = root / f"step-{step:08d}"
    write_checkpoint(folder, TENSORS)
    return folder


def uploaded(root: Path, *steps: int) -> Mirror:
    mirror = Mirror(f"file://{root / 'store'}")
    for step in steps:
        folder = checkpoint(root / "run", step)
        mirror.put(folder, *(path.name for path in sorted(folder.iterdir())))
    return mirror


def refused(mirror: Mirror, root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        mirror.fetch("step-00000003", root / "back", lambda line: None)
    assert not (root / "back" / "step-00000003").exists()
    return str(caught.value)


def test_there_and_back(tmp_path: Path) -> None:
    mirror = uploaded(tmp_path, 3, 20)
    assert mirror.steps() == ["step-00000020", "step-00000003"]
    said: list[str] = []
    folder = mirror.fetch("step-00000020", tmp_path / "back", said.append)
    reader = Reader(folder)
    reader.verify()
    assert torch.equal(reader.tensor("weight", "a"), TENSORS["weight"]["a"])
    assert "file 1 of 2" in said[0] and "file 2 of 2" in said[1]


def test_what_has_no_marker_is_not_there(tmp_path: Path) -> None:
    mirror = uploaded(tmp_path, 3, 20)
    (tmp_path / "store" / "step-00000020" / COMPLETE).unlink()
    assert mirror.steps() == ["step-00000003"]
    assert uploaded(tmp_path / "empty").steps() == []


def test_a_damaged_manifest_or_a_missing_file_leaves_nothing(tmp_path: Path) -> None:
    mirror = uploaded(tmp_path, 3)
    store = tmp_path / "store" / "step-00000003"
    content = (store / MANIFEST).read_bytes()
    (store / MANIFEST).write_bytes(content.replace(b"weight", b"height"))
    assert "[OCT644] checkpoint.mirror=file://" in refused(mirror, tmp_path)
    (store / MANIFEST).write_bytes(content)
    (store / "rank-00001.safetensors").unlink()
    assert "rank-00001.safetensors" in refused(mirror, tmp_path)


def test_a_fetch_that_broke_off_goes_on_with_the_files_it_has(tmp_path: Path) -> None:
    mirror = uploaded(tmp_path, 3)
    lost = tmp_path / "store" / "step-00000003" / "rank-00001.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    refused(mirror, tmp_path)
    lost.write_bytes(content)
    said: list[str] = []
    mirror.fetch("step-00000003", tmp_path / "back", said.append)
    assert len(said) == 1 and "file 2 of 2" in said[0]


def test_a_flipped_byte_there_is_not_brought_here(tmp_path: Path) -> None:
    mirror = uploaded(tmp_path, 3)
    flip_byte(tmp_path / "store" / "step-00000003" / "rank-00000.safetensors", -1)
    assert "[OCT632]" in refused(mirror, tmp_path)
    assert not list((tmp_path / "back").glob("*"))


def test_a_step_that_is_written_again_is_not_finished_meanwhile(tmp_path: Path) -> None:
    mirror = uploaded(tmp_path, 3, 20)
    mirror.begin(Path("step-00000020"))
    assert mirror.steps() == ["step-00000003"]
    mirror.begin(Path("step-00000040"))


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Mirror("nowhere://bucket/run")
    assert "[OCT643] checkpoint.mirror=nowhere://bucket/run: fsspec cannot open it" in str(caught.value)
    assert "checkpoint.mirror=null" in str(caught.value)


def test_trouble_while_writing_is_an_oserror(tmp_path: Path) -> None:
    mirror = uploaded(tmp_path, 3)
    with pytest.raises(OSError):
        mirror.put(tmp_path / "run" / "step-00000003", "not there")
