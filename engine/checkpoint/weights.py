"""The `weights/` folder: one safetensors shard per pipeline stage and an index, in Hugging Face's sharded layout."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.gather import gather_over_tp
from engine.errors import CheckpointError
from engine.model.layers import InitialWeights
from engine.parallel.logical import LogicalTensor
from engine.protocols import Engine

INDEX = "weights.safetensors.index.json"


def save_weights(engine: Engine, folder: Path) -> None:
    """Write the fp32 master weights of every logical tensor into `folder`. Collective; complete or not there at all.

    The first tensor-parallel rank of the first replica holds and writes its stage's shard.

    Raises:
        CheckpointError: 615 some rank could not write; raised on every rank.
    """
    ctx = engine.ctx
    partial = folder.with_name(f"{folder.name}.partial")
    if ctx.is_main:
        # What a save that was killed left behind must not be taken for this one's.
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    gathered = gather_over_tp(engine.parameters(), ctx)
    # Every replica takes part in the gathering, one keeps what comes out.
    tensors = {logical.name: full.contiguous() for logical, full in gathered if ctx.reduce.is_first}
    shard = f"weights-{ctx.pp.rank + 1:05d}-of-{ctx.pp.size:05d}.safetensors"
    trouble = ""
    if tensors:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial / shard)
        except (OSError, SafetensorError) as error:
            trouble = f"rank {ctx.rank}: {error}"
    size = sum(full.numel() * full.element_size() for full in tensors.values())
    written: list[tuple[str, list[str], int]] = [("", [], 0)] * dist.get_world_size()
    dist.all_gather_object(written, (trouble or shard, [] if trouble else list(tensors), size))
    _require_written([what for what, names, total in written if total and not names], folder)
    if ctx.is_main:
        try:
            _commit(folder, partial, [entry for entry in written if entry[1]])
        except OSError as error:
            trouble = f"rank 0: {error}"
    outcome = [trouble]
    dist.broadcast_object_list(outcome, src=0)
    _require_written([line for line in outcome if line], folder)


def _require_written(troubles: list[str], folder: Path) -> None:
    """Refuse a save of which some rank could not write its part (615)."""
    if troubles:
        raise CheckpointError.of(
            615,
            "run.dir",
            folder.parent,
            f"the weights could not be written ({'; '.join(troubles)})",
            "Free space, or point run.dir to a folder that all hosts share and may write",
        )


def _commit(folder: Path, partial: Path, entries: list[tuple[str, list[str], int]]) -> None:
    index = {
        "metadata": {"total_size": sum(size for *_, size in entries)},
        "weight_map": {name: shard for shard, names, _ in entries for name in names},
    }
    (partial / INDEX).write_text(json.dumps(index, indent=1))
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def weights_reader(folder: str, wanted: Mapping[str, LogicalTensor]) -> InitialWeights:
    """Initial weights from a `weights/` folder that any layout wrote.

    Args:
        wanted: every logical tensor of the model; the folder must hold exactly these, with these shapes.

    Raises:
        CheckpointError: 611 no readable index, 612 tensors missing or of another model, 613 a shard is missing or
            damaged, 614 another shape.
    """
    option, root = "checkpoint.initial_weights", Path(folder)
    try:
        weight_map: dict[str, str] = dict(json.loads((root / INDEX).read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError.of(
            611,
            option,
            folder,
            f"{root / INDEX} cannot be read as an index of weights ({error})",
            "Name the `weights` folder that a run with checkpoint.save_final=true wrote",
        ) from error
    missing, extra = sorted(wanted.keys() - weight_map.keys()), sorted(weight_map.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError.of(
            612,
            option,
            folder,
            f"it belongs to another model: {len(missing)} tensors missing {missing[:3]}, {len(extra)} not in this "
            f"model {extra[:3]}",
            "Use the model=... of the run that wrote it (config.yaml beside the folder)",
        )
    for name, logical in wanted.items():
        shape = _shape(root / weight_map[name], name)
        if shape != logical.shape:
            raise CheckpointError.of(
                614,
                option,
                folder,
                f"{name} has shape {list(shape)} there and {list(logical.shape)} in this model",
                "Use the model=... of the run that wrote it (config.yaml beside the folder)",
            )

    def value(logical: LogicalTensor) -> Tensor:
        with safe_open(root / weight_map[logical.name], "pt") as file:
            tensor: Tensor = file.get_tensor(logical.name)
            return tensor.float()

    return value


def _shape(path: Path, name: str) -> tuple[int, ...]:
    try:
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise CheckpointError.of(
            613,
            "checkpoint.initial_weights",
            path.parent,
            f"{path.name} is missing or damaged ({error})",
            "Copy the folder again, or leave checkpoint.initial_weights unset to start from random weights",
        ) from error
