"""Which checkpoint a path means, and which checkpoints are refused for a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint.initial import WEIGHTS, initial_weights, weights_of
from engine.checkpoint.manifest import COMPLETE, MANIFEST
from engine.checkpoint.reader import Reader
from engine.checkpoint.restore import candidates, open_first, require_same_optimizer, require_same_tensors
from engine.checkpoint.retention import step_folder
from engine.errors import CheckpointError, Violation
from engine.model.layers import logical_tensors
from tests.helpers.checkpoints import draws, facts_of, flip_byte, write_checkpoint
from tests.helpers.models import GPT2, config_of, layers_of, noisy_weights

STATE = {"weight": draws({"a": (6, 4), "b": (5,)}), "exp_avg": draws({"a": (6, 4), "b": (5,)}, 1)}
OPTION = "checkpoint.initial_weights"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints after 5, 10 and 15 steps; that of step 15 was never finished."""
    folder = tmp_path / "run"
    for step in (5, 10, 15):
        write_checkpoint(step_folder(folder, step), STATE, facts_of(step=step))
    (step_folder(folder, 15) / COMPLETE).unlink()
    step_folder(folder, 20).with_suffix(".partial").mkdir()
    return folder


def one(caught: pytest.ExceptionInfo[CheckpointError]) -> Violation:
    (violation,) = caught.value.violations
    return violation


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_run_and_its_folder_of_checkpoints_mean_the_newest_finished(below: str, run: Path) -> None:
    assert candidates(run / below) == [step_folder(run, 10), step_folder(run, 5)]


def test_a_checkpoint_means_itself(run: Path) -> None:
    assert candidates(step_folder(run, 5)) == [step_folder(run, 5)]


def test_a_checkpoint_that_was_not_finished_is_named_instead_of_its_siblings(run: Path) -> None:
    assert candidates(step_folder(run, 15)) == [step_folder(run, 15)]
    with pytest.raises(CheckpointError, match=r"OCT631.*COMPLETE is not there"):
        Reader(step_folder(run, 15))


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_no_checkpoint_at_all(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as caught:
        candidates(tmp_path / name)
    found = one(caught)
    assert (found.code, found.option, found.value) == (631, "checkpoint.load", tmp_path / name)
    assert found.rule == "it holds no finished checkpoint"
    assert "a run that had checkpoint.every > 0, or one of its checkpoints/step-... folders" in found.way_out


def test_the_newest_that_can_be_opened_is_taken_and_the_others_are_said(run: Path) -> None:
    said: list[str] = []
    (step_folder(run, 10) / "rank-00000.safetensors").unlink()
    assert open_first(candidates(run), said.append).manifest.step == 5
    (line,) = said
    assert "[OCT632] checkpoint.load=" in line
    assert "rank-00000.safetensors is missing" in line
    assert line.endswith(f"going on with the one before, {step_folder(run, 5)}")


def test_when_none_can_be_opened_the_last_reason_is_raised(run: Path) -> None:
    for step in (5, 10):
        (step_folder(run, step) / MANIFEST).unlink()
    with pytest.raises(CheckpointError) as caught:
        open_first(candidates(run), lambda _: None)
    assert (one(caught).code, one(caught).value) == (632, step_folder(run, 5))


def opened(tmp_path: Path) -> Reader:
    return Reader(write_checkpoint(tmp_path / "x", STATE, facts_of(config_of(GPT2))))


def test_state_of_another_optimizer(tmp_path: Path) -> None:
    reader = opened(tmp_path)
    require_same_optimizer(reader, ["exp_avg", "weight"])
    with pytest.raises(CheckpointError) as caught:
        require_same_optimizer(reader, ["weight", "momentum_buffer"])
    found = one(caught)
    assert (found.code, found.option, found.value) == (637, "checkpoint.load", reader.folder)
    assert found.rule == "it holds exp_avg, weight (optim.name=adamw); this run has momentum_buffer, weight"
    assert "Use the optimizer options of the run that wrote it (optim.name=adamw)" in found.way_out
    assert "checkpoint.initial_weights for its weights alone" in found.way_out


def test_tensors_of_another_model(tmp_path: Path) -> None:
    reader = opened(tmp_path)
    require_same_tensors(reader, "weight", {"b": (5,), "a": (6, 4)})
    with pytest.raises(CheckpointError) as caught:
        require_same_tensors(reader, "weight", {"a": (6, 4), **dict.fromkeys("wxyz", (1,))})
    found = one(caught)
    assert found.code == 638
    assert "it belongs to another model (weight): 4 tensors missing ['w', 'x', 'y']" in found.rule
    assert "1 not in this model ['b']" in found.rule
    assert "(model.name=gpt2; its manifest has them all)" in found.way_out


def test_tensors_of_other_shapes_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_same_tensors(opened(tmp_path), "exp_avg", {"a": (4, 6), "b": (5, 1), "c": ()})
    found = caught.value.violations
    assert [violation.code for violation in found] == [638, 639, 639]
    assert found[1].rule == "a (exp_avg) has shape [6, 4] there and [4, 6] in this model"
    assert found[2].rule == "b (exp_avg) has shape [5] there and [5, 1] in this model"


def test_a_kind_that_is_not_there_is_all_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"OCT638.*another model \(square\): 1 tensors missing \['a'\]"):
        require_same_tensors(opened(tmp_path), "square", {"a": (6, 4)})


def trained(folder: Path, seed: int) -> Path:
    tensors = {name: noisy_weights(seed)(logical) for name, logical in logical_tensors(layers_of(GPT2)).items()}
    return write_checkpoint(folder, {"weight": tensors}, facts_of(config_of(GPT2)))


def test_first_weights_are_the_final_ones_or_else_the_newest(tmp_path: Path) -> None:
    wanted = logical_tensors(layers_of(GPT2))

    def is_seed(folder: Path, seed: int) -> bool:
        read = initial_weights(str(folder), GPT2, wanted, verify=True)
        return all(torch.equal(read(logical), noisy_weights(seed)(logical)) for logical in wanted.values())

    run = tmp_path / "run"
    trained(step_folder(run, 5), 5)
    trained(step_folder(run, 10), 10)
    assert is_seed(run, 10)
    assert is_seed(step_folder(run, 5), 5)
    trained(run / WEIGHTS, 11)
    assert is_seed(run, 11)
    assert is_seed(run / WEIGHTS, 11)


def test_first_weights_of_another_model(tmp_path: Path) -> None:
    wanted = logical_tensors(layers_of(GPT2))
    write_checkpoint(tmp_path / "x", STATE)
    with pytest.raises(CheckpointError) as caught:
        initial_weights(str(tmp_path / "x"), GPT2, wanted)
    found = one(caught)
    assert (found.code, found.option) == (638, OPTION)
    assert "2 not in this model ['a', 'b']" in found.rule


def test_first_weights_are_compared_with_their_checksums_when_asked(tmp_path: Path) -> None:
    wanted, folder = logical_tensors(layers_of(GPT2)), trained(tmp_path / "x", 1)
    flip_byte(folder / "rank-00000.safetensors", 3000)
    initial_weights(str(folder), GPT2, wanted)
    with pytest.raises(CheckpointError, match=r"OCT632. checkpoint.initial_weights=.*has other bytes between 0 and "):
        initial_weights(str(folder), GPT2, wanted, verify=True)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_folders_without_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as caught:
        weights_of(tmp_path / name)
    found = one(caught)
    assert (found.code, found.option, found.value) == (611, OPTION, tmp_path / name)
    assert found.rule == "it has neither weights of Octant nor of transformers (config.json and safetensors)"
    assert found.way_out == "Name a run such as runs/mine, its weights or a checkpoint, or a Hugging Face folder"


def test_weights_that_were_not_finished_say_so(run: Path) -> None:
    with pytest.raises(CheckpointError, match="OCT631"):
        weights_of(step_folder(run, 15))
