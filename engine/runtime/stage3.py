"""ZeRO-3 without offload: gradients are read where the backward pass wrote them, and shards added up and stepped once.

DeepSpeed's own copies a gradient into a bucket, that into another one in the order of ranks, divides it, casts what
comes back to fp32, and adds that: with two ranks and bf16 42 bytes of memory traffic for an element of a shard, where
10 will do. For a step it casts the sums to fp64 and reads them again for the norm, copies them, scales the copy, steps,
and casts the weights: 70 bytes, where 34 will do.

It also lets the host wait for the device after every backward pass, and with one replica before every layer. Here the
host waits in a step, for the norm and the small parameters that are gathered then, and where it is two blocks ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from engine.dist.context import ParallelContext
from engine.optim.flat_adamw import FlatAdamW
from engine.runtime.buckets import averages_well
from engine.runtime.gradients import counts, norm_of_shards
from engine.runtime.mapped_shards import Arriving, MappedShards
from engine_kernels.ops import accumulation

_UNDER_WAY = 12
"""Reductions that the host may have launched and not seen done: those of two blocks, so that it stays a block ahead."""


class Stage3(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's optimizer, whose layout, state and hooks it keeps, with other ways for gradients and steps.

    Made of one that DeepSpeed has built, since DeepSpeed names the class itself.

    Attributes:
        shards: where the parameters' parts are if other ranks map them.
    """

    shards: MappedShards | None

    @classmethod
    def take_over(cls, optimizer: DeepSpeedZeroOptimizer_Stage3, ctx: ParallelContext) -> None:
        """Make `optimizer` one of this class, in place; not of one that offloads."""
        optimizer.__class__ = cls
        optimizer._ctx = ctx
        optimizer._has_weights = set[int]()
        optimizer.max_param_reduce_events = _UNDER_WAY
        optimizer._accumulate = accumulation(optimizer.fp16_groups[0][0].ds_tensor.device)
        optimizer.shards = None
        if ctx.reduce.size == 1:
            for group in optimizer.fp16_groups:
                for parameter in group:
                    parameter.all_gather_coalesced = _gather_from_one

    def _partition_all_parameters(self) -> None:
        """Let go of what is gathered, as every step and every new state begins, and wait until all ranks have."""
        super()._partition_all_parameters()
        if self.shards is not None:
            self.shards.before_writing()

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(  # noqa: N802 -- its name there, a private one
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """This rank's shards of the averages over the ranks that share the parameters, 1-D. Collective."""
        gradient = params_to_reduce[0].grad
        group = self._get_param_partition_group(params_to_reduce[0])
        ranks = dist.get_world_size(group)
        assert gradient is not None
        if ranks == 1:
            return [parameter.grad.contiguous().view(-1) for parameter in params_to_reduce]
        if len(params_to_reduce) > 1 or gradient.numel() % ranks or gradient.dtype is not communication_data_type:
            found: list[Tensor] = super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
                params_to_reduce, communication_data_type
            )
            return found
        whole = gradient.contiguous().view(-1)
        mine = whole.new_empty(whole.numel() // ranks)
        average = averages_well(whole.dtype, group)
        operation = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
        dist.reduce_scatter_tensor(mine, whole if average else whole.div_(ranks), op=operation, group=group)
        return [mine]

    def partition_grads(self, params_to_release: Sequence[Any], grad_partitions: Sequence[Tensor]) -> None:
        """Copy or add shards into the sums of this rank, and let go of the gradients."""
        sums = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for parameter, shard in zip(params_to_release, grad_partitions, strict=True):
            # Of a parameter with fewer elements than ranks some ranks have none.
            if parameter.partition_numel() * self._get_param_partition_rank(parameter) < parameter.ds_numel:
                total = sums[parameter.ds_id].narrow(0, 0, shard.numel())
                self._accumulate(total, shard, first=self.micro_step_id == 0)
                self._offload_boundary_param_ids.add(parameter.ds_id)
            if parameter.grad is not None and parameter.grad.is_cuda:
                parameter.grad.record_stream(torch.cuda.current_stream())
            parameter.grad = None

    def independent_gradient_partition_epilogue(self) -> None:
        """After a backward pass: reduce what is left. The next pass begins meanwhile; a step or a reader waits."""
        for dtype in sort_dtypes(self.ipg_buckets):
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
        self.params_already_reduced.update(dict.fromkeys(self.params_already_reduced, False))
        sums = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for number, group in enumerate(self.fp16_groups):
            self.averaged_gradients[number] = [sums[parameter.ds_id] for parameter in group]
        self._epilogue_ran_this_backward = True

    def _get_norm_groups(self) -> list[Tensor]:
        """The global norm of the gradients times the loss scale. Collective."""
        if self.reduce_and_partition_stream is not None:
            torch.cuda.current_stream().wait_stream(self.reduce_and_partition_stream)
        return [norm_of_shards(self._counted(), self._ctx)]

    def _counted(self) -> Iterator[Tensor]:
        """What this rank counts of the sums, neighbours in one piece."""
        start = 0
        for group in self.fp16_groups:
            for here, parameters in groupby(group, partial(counts, ctx=self._ctx)):
                size = sum(parameter.partition_numel() for parameter in parameters)
                if here:
                    yield self.grad_partitions_flat_buffer[start : start + size]
                start += size

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """The sums lie there in one piece already."""
        if not isinstance(self.optimizer, FlatAdamW):
            master = self.fp32_partitioned_groups_flat[sub_group_id]
            master.grad = self._sums(sub_group_id).to(master.dtype)
        self.averaged_gradients[sub_group_id] = None

    def _sums(self, sub_group_id: int) -> Tensor:
        sizes = self.fp16_partitioned_groups_flat_numel
        return self.grad_partitions_flat_buffer.narrow(0, sum(sizes[:sub_group_id]), sizes[sub_group_id])

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        """As DeepSpeed's; `FlatAdamW` scales what it reads."""
        if not isinstance(self.optimizer, FlatAdamW):
            super().unscale_and_clip_grads(sub_group_id, total_norm)
            return
        divisor = torch.ones_like(total_norm)
        if self.clip_grad > 0:
            divisor = ((total_norm / self.loss_scale + 1e-6) / self.clip_grad).clamp(min=1.0)
        self._factor = (1.0 / (divisor * self.loss_scale)).float()

    def _optimizer_step(self, sub_group_id: int) -> None:
        if not isinstance(self.optimizer, FlatAdamW):
            super()._optimizer_step(sub_group_id)
            return
        group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        master = self.fp32_partitioned_groups_flat[sub_group_id]
        weights = self.fp16_partitioned_groups_flat[sub_group_id]
        copies = weights.dtype is not master.dtype
        sums = self._sums(sub_group_id)
        self.optimizer.update(group, master, sums, self._factor, copy_out=weights if copies else None)
        if copies:
            self._has_weights.add(sub_group_id)

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        """Copy masters to the weights that the model computes with, where the step has not."""
        if sub_group_id in self._has_weights:
            self._has_weights.remove(sub_group_id)
        else:
            super()._reassign_or_swap_out_partitioned_parameters(sub_group_id)


def _gather_from_one(params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Arriving:
    """Stands for `all_gather_coalesced` of a parameter whose one part is the whole."""
    parameters = list(params)
    for parameter in parameters:
        if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
            raise RuntimeError(parameter.ds_summary())
        parameter.ds_status = ZeroParamStatus.INFLIGHT
        parameter.data = parameter.ds_tensor.view(parameter.ds_shape)
    return Arriving(parameters)
