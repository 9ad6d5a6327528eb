"""From slices to logical tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import ParallelContext
from engine.parallel.logical import LogicalTensor


def gather_over_tp(
    slices: Iterable[tuple[LogicalTensor, Tensor]], ctx: ParallelContext
) -> Iterator[tuple[LogicalTensor, Tensor]]:
    """Full tensors, on the CPU, on the first rank of each tensor-parallel group; nothing on the others. Collective.

    One tensor at a time is gathered, so that the extra memory is that of the largest.
    """
    for logical, local in slices:
        if logical.dim is None or ctx.tp.group is None:
            full = local if logical.dim is None else logical.assemble([local])
        else:
            local = local.contiguous()
            parts = [torch.empty_like(local) for _ in range(ctx.tp.size)] if ctx.tp.is_first else None
            dist.gather(local, parts, dst=ctx.tp.ranks[0], group=ctx.tp.group)
            if parts is None:
                continue
            full = logical.assemble(parts)
        if ctx.tp.is_first:
            yield logical, full.cpu()


def gather_to_main(slices: Iterable[tuple[LogicalTensor, Tensor]], ctx: ParallelContext) -> dict[str, Tensor]:
    """Every full tensor by name on rank 0, nothing on the others; for small models. Collective."""
    mine = {logical.name: full.clone() for logical, full in gather_over_tp(slices, ctx)}
    if ctx.replica.group is None:
        return mine
    everyone: list[dict[str, Tensor]] | None = [{}] * ctx.replica.size if ctx.replica.is_first else None
    dist.gather_object(mine, everyone, dst=ctx.replica.ranks[0], group=ctx.replica.group)
    return {name: full for part in everyone or [] for name, full in part.items()}
