"""The models of transformers with our weights, and what they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.config.enums import Family
from engine.model.batch import IGNORE, Batch
from engine.model.hf import hf_names
from engine.model.hf_config import architecture, hf_config

Tensors = dict[str, Tensor]


def with_weights(cfg: ModelConfig, ours: Mapping[str, Tensor]) -> nn.Module:
    """The model of transformers that `cfg` means, in eval mode, every one of its weights taken from `ours`."""
    model = empty_model(cfg)
    model.load_state_dict(renamed(cfg, ours), strict=True)
    return model.float().eval()


def empty_model(cfg: ModelConfig) -> nn.Module:
    """The model of transformers that `cfg` means, with random weights."""
    import transformers

    config = hf_config(cfg)
    config._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, architecture(cfg))(config)
    return model


def renamed(cfg: ModelConfig, ours: Mapping[str, Tensor]) -> Tensors:
    """Logical tensors by the names that transformers' models have; all names of what has several."""
    return {
        in_model(name): part.turned(ours[own][part.start : part.stop])
        for own, parts in hf_names(cfg).items()
        for part in parts
        for name in (part.name, *part.also)
    }


def in_model(name: str) -> str:
    """The name of a tensor of a file in a model: transformers renames the head of GPT-NeoX as it reads and writes."""
    return name.replace("embed_out.", "lm_head.")


def relative_errors(cfg: ModelConfig, ours: Mapping[str, Tensor], theirs: nn.Module) -> dict[str, float]:
    """Error of each of our gradients against theirs: norm of the difference over the norm, by logical name.

    Parts of a fused tensor count together: a key's bias alone has a gradient of rounding only, because the softmax
    takes no notice of it.
    """
    names, found = list(ours), renamed(cfg, ours)
    marks = renamed(cfg, {name: torch.full_like(ours[name], i) for i, name in enumerate(names)})
    missed, size = (torch.zeros(len(names), dtype=torch.float64) for _ in range(2))
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None, name
        whose = int(marks[name].flatten()[0])
        missed[whose] += (found[name].double() - parameter.grad.double()).square().sum()
        size[whose] += parameter.grad.double().square().sum()
    return dict(zip(names, (missed / size).sqrt().tolist(), strict=True))


def comparable(cfg: ModelConfig, batch: Batch) -> Batch:
    """`batch` without what transformers' decoders cannot be asked: a target for the last position."""
    if cfg.family is Family.bert:
        return batch
    last_BS = torch.arange(batch.length).expand_as(batch.labels_BS) == batch.length - 1
    return replace(batch, labels_BS=batch.labels_BS.masked_fill(last_BS, IGNORE))


def inputs_of(cfg: ModelConfig, batch: Batch) -> dict[str, Any]:
    """Arguments of a forward pass with losses over `batch` as a whole step; theirs shift the labels of a decoder."""
    if cfg.family is not Family.bert:
        # Position t + 1 of their labels is position t of ours.
        assert (batch.labels_BS[:, -1] == IGNORE).all(), "they have no target for the last position"
        first_B1 = torch.full_like(batch.labels_BS[:, :1], IGNORE)
        return {"input_ids": batch.tokens_BS, "labels": torch.cat([first_B1, batch.labels_BS[:, :-1]], dim=1)}
    found = {"input_ids": batch.tokens_BS, "labels": batch.labels_BS, "token_type_ids": batch.token_types_BS}
    if batch.lengths_B is not None:
        found["attention_mask"] = (torch.arange(batch.length) < batch.lengths_B[:, None]).long()
    if batch.sentence_B is not None:
        found["next_sentence_label"] = batch.sentence_B
    return found
