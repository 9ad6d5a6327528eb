"""What the flat tensors hold that DeepSpeed gives an optimizer in place of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from engine.config.enums import OptimizerName
from engine.optim.pieces import LogicalOptimizer, Piece
from engine.optim.state import Held
from engine.parallel.logical import logical_of
from engine.runtime.flat import FlatOptimizer


def attach_pieces(ds_optimizer: object, name: OptimizerName) -> None:
    """Tell the optimizer inside DeepSpeed's what its tensors hold, if it wants to know.

    To be called once, after `deepspeed.initialize`. Collective over the data-parallel group.

    Args:
        ds_optimizer: the `optimizer` of a `DeepSpeedEngine`.
    """
    optimizer = getattr(ds_optimizer, "optimizer", ds_optimizer)
    if isinstance(optimizer, LogicalOptimizer) and optimizer is not ds_optimizer:
        optimizer.attach({held.tensor: held.pieces for held in held_tensors(ds_optimizer, name)}, sharded=True)


def held_tensors(ds_optimizer: Any, name: OptimizerName) -> list[Held]:
    """Every tensor that the optimizer inside DeepSpeed's steps, in the same order on the ranks that share them.

    Args:
        ds_optimizer: the `optimizer` of a `DeepSpeedEngine`: without ZeRO, the optimizer that it was given.
        name: of `optim.name`.
    """
    if isinstance(ds_optimizer, DeepSpeedZeroOptimizer_Stage3):
        return list(_partitioned(ds_optimizer, name))
    inner = getattr(ds_optimizer, "optimizer", ds_optimizer)
    if isinstance(ds_optimizer, DeepSpeedZeroOptimizer):
        flats, parameters = ds_optimizer.single_partition_of_fp32_groups, ds_optimizer.bit16_groups
    elif isinstance(ds_optimizer, FlatOptimizer):
        return list(_stretches(ds_optimizer, name))
    elif isinstance(ds_optimizer, BF16_Optimizer):
        flats, parameters = ds_optimizer.fp32_groups_flat_partition, ds_optimizer.bf16_groups
    else:
        return [
            Held(inner, name, group, tensor, [_piece(tensor, tuple(tensor.shape), 0, 0, tensor.numel())], False)
            for group in inner.param_groups
            for tensor in group["params"]
        ]
    return [
        Held(inner, name, group, flat, _linked(members), True)
        for group, flat, members in zip(inner.param_groups, flats, parameters, strict=True)
    ]


def _stretches(ds_optimizer: FlatOptimizer, name: OptimizerName) -> Iterator[Held]:
    """Each group's partition may lie in two places."""
    inner = ds_optimizer.optimizer
    for group, found, members in zip(
        inner.param_groups, ds_optimizer.stretches(), ds_optimizer.bf16_groups, strict=True
    ):
        pieces = _linked(members)
        for start, tensor in found:
            here = [piece.within(start, start + tensor.numel()) for piece in pieces]
            yield Held(inner, name, group, tensor, here, True)


def _partitioned(ds_optimizer: DeepSpeedZeroOptimizer_Stage3, name: OptimizerName) -> Iterator[Held]:
    """ZeRO 3 cuts parameter groups into sub-groups, and may step some of them on the GPU when it offloads the rest."""
    for index, flat in enumerate(ds_optimizer.fp32_partitioned_groups_flat):
        optimizer: torch.optim.Optimizer = ds_optimizer.optimizer
        if ds_optimizer.offload_optimizer and ds_optimizer.subgroup_to_device[index] != "cpu":
            optimizer = ds_optimizer.backup_optimizer
        group = optimizer.param_groups[ds_optimizer.sub_group_to_group_id[index]]
        yield Held(optimizer, name, group, flat, list(_partitions(ds_optimizer.fp16_groups[index])), True)


def _piece(parameter: nn.Parameter, shape: tuple[int, ...], start: int, offset: int, size: int) -> Piece:
    return Piece(
        logical=logical_of(parameter),
        local_shape=shape,
        start=start,
        offset=offset,
        size=size,
        copy=getattr(parameter, "ds_pipe_replicated", False),
    )


def _linked(parameters: Sequence[nn.Parameter]) -> list[Piece]:
    """ZeRO 1 and 2: each parameter knows its stretch of this rank's partition, or that it has none."""
    found = []
    for parameter in parameters:
        shape, mapping = tuple(parameter.shape), parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            found.append(_piece(parameter, shape, 0, 0, 0))
        else:
            local, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            found.append(_piece(parameter, shape, local.start, flat.start, local.numel))
    return found


def _partitions(parameters: Sequence[nn.Parameter]) -> Iterator[Piece]:
    """ZeRO 3: every parameter is cut into equal parts, and a rank's parts stand one after the other.

    The last parts of a parameter may be padded.
    """
    offset = 0
    for parameter in parameters:
        part: int = parameter.partition_numel()  # type: ignore[attr-defined]
        start = dist.get_rank(group=parameter.ds_process_group) * part  # type: ignore[attr-defined]
        size = max(0, min(part, parameter.ds_numel - start))  # type: ignore[attr-defined]
        yield _piece(parameter, tuple(parameter.ds_shape), start if size else 0, offset, size)  # type: ignore[attr-defined]
        offset += part
