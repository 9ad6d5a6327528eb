"""Two checkpoints side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.compare import compare, logical_hashes
from engine.checkpoint.reader import Reader
from tests.helpers.checkpoints import State, draws, facts_of, write_checkpoint
from tests.helpers.models import GPT2, config_of

SHAPES = {"a": (6, 4), "b": (5,), "c": ()}
STATE = {"weight": draws(SHAPES), "exp_avg": draws(SHAPES, 1)}


def reader(folder: Path, state: State = STATE, files: int = 2, **facts: Any) -> Reader:
    return Reader(write_checkpoint(folder, state, facts_of(config_of(GPT2)) | facts, files=files))


def with_weight(name: str, value: torch.Tensor) -> State:
    return {**STATE, "weight": {**STATE["weight"], name: value}}


def test_layouts_do_not_show(tmp_path: Path) -> None:
    one, other = reader(tmp_path / "1", files=1), reader(tmp_path / "2", files=4)
    found = compare(one, other)
    assert (found.facts, found.tensors, found.equal) == ([], [], 6)
    assert logical_hashes(one) == logical_hashes(other)
    assert len(set(logical_hashes(one).values())) == 6


def test_one_bit_shows(tmp_path: Path) -> None:
    value = STATE["weight"]["a"].clone()
    value.view(torch.int32)[2, 3] ^= 1
    one, other = reader(tmp_path / "1"), reader(tmp_path / "2", with_weight("a", value))
    found = compare(one, other)
    assert found.equal == 5
    (line,) = found.tensors
    assert line.startswith("weight a: 4.17% of it, by up to ")
    differ = [key for key, value in logical_hashes(one).items() if logical_hashes(other)[key] != value]
    assert differ == [("weight", "a")]


def test_how_far_values_are_apart(tmp_path: Path) -> None:
    value = torch.zeros(6, 4)
    value[0, :2] = torch.tensor([-3.0, 1.0])
    one, other = reader(tmp_path / "1", with_weight("a", value)), reader(tmp_path / "2", with_weight("a", value + 0.5))
    assert compare(one, other).tensors == ["weight a: 100.00% of it, by up to 0.5 (values to 3)"]


def test_signs_of_zero_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    first = torch.tensor([0.0, torch.nan, 1.0, 1.0, 1.0])
    second = torch.tensor([-0.0, torch.nan, 1.0, 1.0, torch.nan])
    one, other = reader(tmp_path / "1", with_weight("b", first)), reader(tmp_path / "2", with_weight("b", second))
    assert compare(one, one).tensors == []
    (line,) = compare(one, other).tensors
    assert line.startswith("weight b: 40.00% of it, by up to nan")


def test_tensors_that_only_one_has_and_other_shapes(tmp_path: Path) -> None:
    other = {"weight": {**draws({"a": (4, 6), "z": (1,)}), "c": STATE["weight"]["c"]}}
    found = compare(reader(tmp_path / "1"), reader(tmp_path / "2", other))
    assert found.tensors == [
        "exp_avg a: only in the first",
        "exp_avg b: only in the first",
        "exp_avg c: only in the first",
        "weight b: only in the first",
        "weight z: only in the second",
        "weight a: shape [6, 4] | [4, 6]",
    ]
    assert found.equal == 1


def test_options_and_facts_that_differ(tmp_path: Path) -> None:
    changed = facts_of(config_of(GPT2, optim__lr=0.5), 9, grid={"pp": 2}, time="later")
    one = reader(tmp_path / "1", grid={"pp": 1}, time="now")
    other = Reader(write_checkpoint(tmp_path / "2", STATE, changed))
    assert compare(one, other).facts == [
        "config.optim.lr: 0.001 | 0.5",
        "grid.pp: 1 | 2",
        "numbers.optimizer_steps: 7.0 | 9.0",
        "samples: 56 | 72",
        "step: 7 | 9",
    ]
