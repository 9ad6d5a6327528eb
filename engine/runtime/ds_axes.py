"""Our axes in DeepSpeed's words, where "model" means all that splits one copy of the model: pp and tp together."""

from __future__ import annotations

from collections.abc import Iterable

import deepspeed
import torch.distributed as dist
from torch import nn

from engine.dist.context import ParallelContext
from engine.parallel.logical import logical_of

# The CPU backend would compile a shared-memory all-reduce (80 s at the first start) that only inference calls.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def mark_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Tell DeepSpeed which parameters are cut over tp, so that its gradient norm counts the others once."""
    for parameter in parameters:
        parameter.tensor_model_parallel = logical_of(parameter).dim is not None  # type: ignore[attr-defined]


class Axes:
    """DeepSpeed's `mpu` protocol: who averages gradients with me, and who holds the rest of my copy of the model."""

    def __init__(self, ctx: ParallelContext) -> None:
        self._ctx = ctx
        # DeepSpeed wants a real group also for an axis of one rank.
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][ctx.rank]
        self._groups: dict[str, dist.ProcessGroup] = {
            name: axis.group or alone
            for name, axis in (("reduce", ctx.reduce), ("replica", ctx.replica), ("tp", ctx.tp))
        }

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["reduce"]

    def get_data_parallel_world_size(self) -> int:
        return self._ctx.reduce.size

    def get_data_parallel_rank(self) -> int:
        return self._ctx.reduce.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["replica"]

    def get_model_parallel_world_size(self) -> int:
        return self._ctx.replica.size

    def get_model_parallel_rank(self) -> int:
        return self._ctx.replica.rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["tp"]

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._ctx.tp.size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._ctx.tp.rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._ctx.pp.size
