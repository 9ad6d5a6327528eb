"""Our axes in DeepSpeed's words, where "model" means all that splits one replica: pp and tp together."""

from __future__ import annotations

from collections.abc import Iterable

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from engine.dist.context import ParallelContext
from engine.parallel.logical import logical_of

# The CPU backend would compile a shared-memory all-reduce (80 s at the first start) that only inference calls.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def mark_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Tell DeepSpeed which parameters are cut over tp, so that its gradient norm counts the others once."""
    for parameter in parameters:
        parameter.tensor_model_parallel = logical_of(parameter).dim is not None  # type: ignore[attr-defined]


def topology(ctx: ParallelContext) -> PipeModelDataParallelTopology:
    """DeepSpeed's topology with our axis order (pp, dp, tp)."""
    return PipeModelDataParallelTopology(num_pp=ctx.pp.size, num_dp=ctx.dp.size, num_mp=ctx.tp.size)


class TensorDataUnit:
    """DeepSpeed's `mpu` protocol for pp=1: who shares my data, who shares my model."""

    def __init__(self, ctx: ParallelContext) -> None:
        self._ctx = ctx
        # DeepSpeed wants a real group also for an axis of one rank.
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][ctx.rank]
        self._groups: dict[str, dist.ProcessGroup] = {"dp": ctx.dp.group or alone, "tp": ctx.tp.group or alone}

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["dp"]

    def get_data_parallel_world_size(self) -> int:
        return self._ctx.dp.size

    def get_data_parallel_rank(self) -> int:
        return self._ctx.dp.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups["tp"]

    def get_model_parallel_world_size(self) -> int:
        return self._ctx.tp.size

    def get_model_parallel_rank(self) -> int:
        return self._ctx.tp.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1
