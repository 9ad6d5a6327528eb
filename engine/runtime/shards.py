"""What the flat tensors hold that DeepSpeed gives an optimizer in place of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from engine.optim.pieces import LogicalOptimizer, Piece
from engine.parallel.logical import logical_of


def attach_pieces(ds_optimizer: object) -> None:
    """Tell the optimizer inside DeepSpeed's what its tensors hold, if it wants to know.

    To be called once, after `deepspeed.initialize`. Collective over the data-parallel group.

    Args:
        ds_optimizer: the `optimizer` of a `DeepSpeedEngine`.
    """
    optimizer = getattr(ds_optimizer, "optimizer", ds_optimizer)
    if not isinstance(optimizer, LogicalOptimizer):
        return
    if isinstance(ds_optimizer, DeepSpeedZeroOptimizer):
        groups = zip(ds_optimizer.single_partition_of_fp32_groups, ds_optimizer.bit16_groups, strict=True)
        optimizer.attach({flat: _linked(parameters) for flat, parameters in groups}, sharded=True)
    elif isinstance(ds_optimizer, BF16_Optimizer):
        groups = zip(ds_optimizer.fp32_groups_flat_partition, ds_optimizer.bf16_groups, strict=True)
        optimizer.attach({flat: _linked(parameters) for flat, parameters in groups}, sharded=True)
    elif isinstance(ds_optimizer, DeepSpeedZeroOptimizer_Stage3):
        groups = zip(ds_optimizer.fp32_partitioned_groups_flat, ds_optimizer.fp16_groups, strict=True)
        optimizer.attach({flat: list(_partitions(parameters)) for flat, parameters in groups}, sharded=True)


def _piece(parameter: nn.Parameter, shape: tuple[int, ...], start: int, offset: int, size: int) -> Piece:
    return Piece(logical=logical_of(parameter), local_shape=shape, start=start, offset=offset, size=size)


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
