"""Where a run's first weights come from: an earlier run, one of its checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from engine.checkpoint.hf_reader import CONFIG, hf_reader, is_hf_folder
from engine.checkpoint.manifest import MANIFEST, is_complete
from engine.checkpoint.reader import Reader
from engine.checkpoint.restore import candidates, require_same_tensors
from engine.checkpoint.retention import CHECKPOINTS
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError
from engine.model.layers import InitialWeights
from engine.optim.state import WEIGHT
from engine.parallel.logical import LogicalTensor

OPTION = "checkpoint.initial_weights"
WEIGHTS = "weights"
"""Folder of a run with its final weights."""


def initial_weights(
    folder: str, model: ModelConfig, wanted: Mapping[str, LogicalTensor], *, verify: bool = False
) -> InitialWeights:
    """The weights in `folder`, written by any layout or by transformers.

    Args:
        wanted: every logical tensor of `model`.
        verify: compare every byte with its checksum, where there are some.

    Raises:
        CheckpointError: see `weights_of`, `require_same_tensors`, `Reader.verify` and `hf_reader`.
    """
    root = Path(folder)
    if is_theirs(root):
        return hf_reader(folder, model, wanted)
    reader = weights_of(root)
    require_same_tensors(reader, WEIGHT, {name: logical.shape for name, logical in wanted.items()}, OPTION)
    if verify:
        reader.verify()

    def value(logical: LogicalTensor) -> Tensor:
        return reader.tensor(WEIGHT, logical.name)

    return value


def is_theirs(root: Path) -> bool:
    """Whether `root` is transformers'; what Octant wrote is not, whatever else lies there."""
    ours = is_complete(root) or (root / WEIGHTS).is_dir() or (root / CHECKPOINTS).is_dir()
    return is_hf_folder(root) and not ours


def weights_of(root: Path, option: str = OPTION) -> Reader:
    """The weights of a run, the final ones or a checkpoint's, whichever have more steps; or those in a checkpoint.

    Raises:
        CheckpointError: 611 there are none; see also `Reader`.
    """
    final = Reader(root / WEIGHTS, option) if is_complete(root / WEIGHTS) else None
    try:
        newest = Reader(candidates(root, option)[0], option)
    except CheckpointError as error:
        if final is not None:
            return final
        if error.violations[0].code != 631 or (root / MANIFEST).exists():
            raise
        rule = f"it has neither weights of Octant nor of transformers ({CONFIG} and safetensors)"
        way_out = "Name a run such as runs/mine, its weights or a checkpoint, or a Hugging Face folder"
        raise CheckpointError.of(611, option, root, rule, way_out) from error
    return newest if final is None or newest.manifest.step > final.manifest.step else final


def final_step(run: Path) -> int:
    """Steps of the final weights of a run; -1: it has none that can be read."""
    try:
        return Reader(run / WEIGHTS, OPTION).manifest.step
    except CheckpointError:
        return -1
