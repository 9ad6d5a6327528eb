"""The manifest: there and back, and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import manifest as module
from engine.checkpoint.manifest import Manifest, ShardFile, blocks, decode, is_complete
from engine.errors import CheckpointError
from engine.parallel.rectangles import Rectangle
from tests.helpers.checkpoints import draws, facts_of, manifest_of, write_checkpoint

FOLDER = Path("runs/mine/checkpoints/step-00000007")
STATE = {"weight": draws({"a": (6, 4), "b": (5,), "c": ()}), "exp_avg": draws({"a": (6, 4)})}


def refused(content: bytes) -> tuple[int, str, str]:
    """Code, rule and way out of the only violation; the option and the folder are named."""
    with pytest.raises(CheckpointError) as caught:
        decode(content, FOLDER, "checkpoint.load")
    (violation,) = caught.value.violations
    assert f"checkpoint.load={FOLDER}: " in str(violation)
    return violation.code, violation.rule, violation.way_out


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A sound manifest in which `change` has changed something."""
    raw = json.loads(manifest_of(STATE, files=2).encode())
    change(raw)
    return json.dumps(raw).encode()


@pytest.mark.parametrize("files", [1, 3])
def test_a_manifest_comes_back_as_it_was(files: int) -> None:
    before = manifest_of(STATE, files)
    after = decode(before.encode(), FOLDER, "checkpoint.load")
    assert after == before
    assert (after.step, after.facts["samples"]) == (7, 56)
    # 24 + 5 + 1 + 24 elements of 4 bytes, after 64 bytes of each header.
    assert after.size == 54 * 4 + 64 * files


def test_parts_stand_one_after_the_other() -> None:
    places = (("weight", "a", Rectangle(0, 2, 0, 3)), ("exp_avg", "a", Rectangle(4, 5, 1, 3)))
    file = ShardFile("x.safetensors", 128 + 32, 128, ("0",), places)
    assert [part.offset for part in file.parts()] == [128, 128 + 24]


def test_what_is_complete_has_its_marker(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "one", STATE)
    assert is_complete(folder)
    (folder / module.COMPLETE).unlink()
    assert not is_complete(folder)
    assert not is_complete(tmp_path / "nowhere")


def test_a_newer_version_is_named() -> None:
    code, rule, way_out = refused(changed(lambda raw: raw.update(version=2)))
    assert (code, rule) == (633, "manifest.json is of version 2, and this Octant reads up to 1")
    assert way_out == "Read it with the Octant that wrote it, or a newer one"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"{}",
        b'{"format": "pt", "version": 1}',
        changed(lambda raw: raw.update(format="octant")),
        changed(lambda raw: raw.update(version="1")),
        changed(lambda raw: raw.pop("tensors")),
        changed(lambda raw: raw.update(tensors=[])),
        changed(lambda raw: raw.update(files={"name": "x"})),
        changed(lambda raw: raw.pop("step")),
        changed(lambda raw: raw.update(samples="many")),
        changed(lambda raw: raw.pop("numbers")),
        changed(lambda raw: raw.update(numbers=3)),
        changed(lambda raw: raw["files"][0].pop("sha256")),
        changed(lambda raw: raw["files"][0]["rectangles"][0].pop()),
    ],
)
def test_json_of_others_is_refused(content: bytes) -> None:
    code, rule, way_out = refused(content)
    assert code == 634
    assert rule.startswith("manifest.json cannot be read as a checkpoint's (")
    assert way_out == "Name a checkpoint that Octant wrote"


NAMES = ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.pkl", "x", "", "..", ".safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_not_tensors_in_the_folder_are_not_touched(name: str) -> None:
    code, rule, _ = refused(changed(lambda raw: raw["files"][1].update(name=name)))
    assert code == 634
    assert f"{name!r} is no file of tensors in the folder" in rule


def test_sizes_fit_the_rectangles() -> None:
    _, rule, _ = refused(changed(lambda raw: raw["files"][0].update(size=1000)))
    assert "rank-00000.safetensors is 1000 bytes, its rectangles others" in rule


@pytest.mark.parametrize("header", [-64, 63])
def test_elements_begin_where_elements_can(header: int) -> None:
    def move(raw: dict[str, Any]) -> None:
        file = raw["files"][0]
        file.update(size=file["size"] - 64 + header, header=header)

    _, rule, _ = refused(changed(move))
    assert f"rank-00000.safetensors cannot have elements after {header} bytes" in rule


def test_every_block_has_a_checksum() -> None:
    code, rule, _ = refused(changed(lambda raw: raw["files"][1].update(sha256=["0", "1"])))
    assert code == 634
    assert "rank-00001.safetensors has 2 checksums for " in rule


def test_long_files_have_a_checksum_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 100)
    file = manifest_of(STATE).files[0]
    assert file.size == 280
    long = replace(file, sha256=("0", "1", "2"))
    assert ShardFile.from_json(long.to_json()) == long
    other = replace(long, sha256=("3",))
    assert blocks([long, other]) == [(long, 0), (long, 1), (long, 2), (other, 0)]


def places(*found: Rectangle, shape: tuple[int, ...] = (4, 6)) -> Manifest:
    """A manifest of one tensor in these rectangles."""
    rectangles = tuple(("weight", "a", place) for place in found)
    size = 64 + 4 * sum(place.size for place in found)
    file = ShardFile("x.safetensors", size, 64, ("0",), rectangles)
    return Manifest(facts_of(), {"weight": {"a": shape}}, (file,))


@pytest.mark.parametrize(
    "found",
    [
        [Rectangle(0, 4, 0, 6)],
        [Rectangle(0, 1, 2, 6), Rectangle(0, 1, 0, 2), Rectangle(1, 4, 0, 6)],
        [Rectangle(0, 4, 3, 6), Rectangle(0, 2, 0, 3), Rectangle(2, 4, 0, 3)],
        [Rectangle(row, row + 1, column, column + 2) for row in range(4) for column in (0, 2, 4)],
    ],
)
def test_rectangles_that_tile_are_whole(found: list[Rectangle]) -> None:
    assert sum(place.size for place in found) == prod((4, 6))
    assert places(*found).gaps() == []


@pytest.mark.parametrize(
    "found",
    [
        [],
        [Rectangle(0, 3, 0, 6)],
        [Rectangle(0, 4, 0, 6), Rectangle(1, 2, 0, 1)],
        # As many elements as the tensor has, some twice and some missing.
        [Rectangle(0, 3, 0, 6), Rectangle(2, 3, 0, 6)],
        [Rectangle(0, 4, 0, 4), Rectangle(0, 4, 3, 5)],
        # As many elements, elsewhere.
        [Rectangle(4, 8, 0, 6)],
        [Rectangle(0, 6, 0, 4)],
        [Rectangle(4, 0, 6, 0)],
    ],
)
def test_gaps_and_overlaps_are_refused(found: list[Rectangle]) -> None:
    manifest = places(*found)
    assert manifest.gaps() == ["weight a"]
    code, rule, way_out = refused(manifest.encode())
    assert (code, way_out) == (634, "Name another checkpoint")
    assert rule == "elements of 1 tensors are missing, there twice or out of place: weight a"


def test_rectangles_of_a_tensor_that_is_not_listed_are_refused() -> None:
    manifest = replace(manifest_of(STATE), shapes={"weight": {"a": (6, 4), "b": (5,), "c": ()}})
    assert manifest.gaps() == ["exp_avg a"]
    assert refused(manifest.encode())[0] == 634


def test_only_three_of_many_gaps_are_named() -> None:
    shapes = {"weight": {f"t{i}": tuple(torch.zeros(2).shape) for i in range(5)}}
    _, rule, _ = refused(Manifest(facts_of(), shapes, ()).encode())
    assert rule.endswith(
        "elements of 5 tensors are missing, there twice or out of place: weight t0, weight t1, weight t2"
    )
