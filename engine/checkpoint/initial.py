"""Where a run's first weights come from: `weights/` of an earlier run, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.checkpoint.hf_reader import hf_reader, is_hf_folder
from engine.checkpoint.weights import INDEX, weights_reader
from engine.config.schema import ModelConfig
from engine.model.layers import InitialWeights
from engine.parallel.logical import LogicalTensor


def initial_weights(folder: str, model: ModelConfig, wanted: Mapping[str, LogicalTensor]) -> InitialWeights:
    """The weights in `folder`, written by any layout or by transformers.

    Args:
        wanted: every logical tensor of `model`.

    Raises:
        CheckpointError: see `weights_reader` and `hf_reader`.
    """
    root = Path(folder)
    if not (root / INDEX).exists() and is_hf_folder(root):
        return hf_reader(folder, model, wanted)
    return weights_reader(folder, wanted)
