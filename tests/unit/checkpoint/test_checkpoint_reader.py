"""A `weights/` folder that is read back, and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.weights import INDEX, weights_reader
from engine.errors import CheckpointError
from engine.parallel.logical import LogicalTensor

SHARDS = {
    "weights-00001-of-00002.safetensors": {"embed": torch.arange(12.0).view(4, 3), "norm": torch.ones(3)},
    "weights-00002-of-00002.safetensors": {"head": torch.arange(12.0).view(4, 3) * 2},
}
SECOND = "weights-00002-of-00002.safetensors"
OPTION = "checkpoint.initial_weights"
SAME_MODEL = "Use the model=... of the run that wrote it (config.yaml beside the folder)"
WANTED = {
    name: LogicalTensor(tuple(tensor.shape), name=name)
    for tensors in SHARDS.values()
    for name, tensor in tensors.items()
}


def write(folder: Path, shards: Mapping[str, Mapping[str, Tensor]] = SHARDS) -> Path:
    folder.mkdir()
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "weights")


def refused(folder: Path, wanted: Mapping[str, LogicalTensor] = WANTED) -> tuple[str, str, str]:
    """Head, rule and way out of the only violation."""
    with pytest.raises(CheckpointError) as caught:
        weights_reader(str(folder), wanted)
    (violation,) = caught.value.violations
    return str(violation).split(": ", 1)[0], violation.rule, violation.way_out


def test_every_tensor_comes_back_from_its_shard(folder: Path) -> None:
    initial = weights_reader(str(folder), WANTED)
    for tensors in SHARDS.values():
        for name, tensor in tensors.items():
            assert torch.equal(initial(WANTED[name]), tensor)


def test_values_are_fp32_whatever_was_stored(tmp_path: Path) -> None:
    stored = torch.tensor([0.5, 3.0]).bfloat16()
    folder = write(tmp_path / "weights", {"a.safetensors": {"x": stored}})
    value = weights_reader(str(folder), {"x": LogicalTensor((2,), name="x")})(LogicalTensor((2,), name="x"))
    assert value.dtype is torch.float32
    assert value.tolist() == [0.5, 3.0]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    head, rule, way_out = refused(tmp_path / "nowhere")
    assert head == f"[OCT611] {OPTION}={tmp_path / 'nowhere'}"
    assert f"{tmp_path / 'nowhere' / INDEX} cannot be read as an index of weights" in rule
    assert "No such file" in rule
    assert way_out == "Name the `weights` folder that a run with checkpoint.save_final=true wrote"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"weight_map": {"embed"',
        b"\xff\xfe\x00",
        b"[]",
        b"{}",
        b'{"weight_map": ["embed"]}',
        b'{"weight_map": 3}',
    ],
)
def test_an_index_that_is_none(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    head, rule, way_out = refused(folder)
    assert head.startswith("[OCT611]")
    assert "cannot be read as an index of weights" in rule
    assert "checkpoint.save_final=true" in way_out


def test_weights_of_another_model(folder: Path) -> None:
    wanted = {name: WANTED[name] for name in ("embed", "norm")}
    wanted |= {name: LogicalTensor((1,), name=name) for name in ("a", "b", "c", "d")}
    head, rule, way_out = refused(folder, wanted)
    assert head == f"[OCT612] {OPTION}={folder}"
    assert "it belongs to another model" in rule
    assert "4 tensors missing ['a', 'b', 'c']" in rule
    assert "1 not in this model ['head']" in rule
    assert way_out == SAME_MODEL


def test_a_shard_that_is_missing(folder: Path) -> None:
    (folder / SECOND).unlink()
    head, rule, way_out = refused(folder)
    assert head == f"[OCT613] {OPTION}={folder}"
    assert f"{SECOND} is missing or damaged (" in rule
    assert way_out.startswith("Copy the folder again, or leave checkpoint.initial_weights unset")


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_a_shard_that_is_damaged(folder: Path, damage: str) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(
        {"truncated": content[:-8], "header": b"\xff" * 16 + content[16:], "empty": b""}[damage]
    )
    head, rule, _ = refused(folder)
    assert head == f"[OCT613] {OPTION}={folder}"
    assert f"{SECOND} is missing or damaged (" in rule


def test_a_shard_without_the_tensor_that_the_index_promises(folder: Path) -> None:
    save_file({"other": torch.ones(1)}, folder / SECOND)
    head, rule, _ = refused(folder)
    assert head.startswith("[OCT613]")
    assert "head" in rule


def test_a_tensor_of_another_shape(folder: Path) -> None:
    head, rule, way_out = refused(folder, {**WANTED, "embed": LogicalTensor((8, 3), name="embed")})
    assert head == f"[OCT614] {OPTION}={folder}"
    assert rule == "embed has shape [4, 3] there and [8, 3] in this model"
    assert way_out == SAME_MODEL


def test_all_shapes_are_read_before_any_value_is_asked_for(folder: Path) -> None:
    _, rule, _ = refused(folder, {**WANTED, "head": LogicalTensor((4, 4), name="head")})
    assert rule.startswith("head has shape [4, 3]")
