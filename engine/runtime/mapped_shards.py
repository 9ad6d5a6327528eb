"""ZeRO-3 over parts that the ranks of a host map of each other: each rank copies what it needs, when it needs it.

Parts change at a step only, so between two steps a rank may read those of others without their help. NCCL's all-gather
is a kernel on all of them: it takes multiprocessors from the products beside it, begins when a product leaves it room,
and queues behind the reductions of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor


class Memory(Protocol):
    """See `engine.parallel.symmetric.Mapped`."""

    tensors: list[Tensor]

    def meet(self) -> None:
        """Let the current stream wait for those of all ranks."""
        ...


class MappedShards:
    """The parts of all parameters that `optimizer` steps, moved into `memory` and gathered from there from now on.

    Args:
        memory: of the ranks that share the parameters, in their order; as large as `optimizer.lp_param_buffer`.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3, memory: Memory, rank: int) -> None:
        self._memory, self._rank = memory, rank
        self._device = memory.tensors[rank].device
        self._offsets: dict[int, int] = {}
        self._is_current = False
        self._written: torch.cuda.Event | None = None
        self._read: torch.cuda.Event | None = None
        own, offset = memory.tensors[rank], 0
        own.copy_(optimizer.lp_param_buffer)
        optimizer.lp_param_buffer = own
        parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
        self._gather_others = parameters[0].all_gather_coalesced
        for parameter in parameters:
            part = parameter.ds_tensor
            part.data = own.narrow(0, offset, part.numel())
            self._offsets[parameter.ds_id] = offset
            parameter.all_gather_coalesced = self.gather
            offset += part.numel()
        # In fp32 these may be the masters themselves, so the tensors stay and what is in them moves.
        offset = 0
        for flat in optimizer.fp16_partitioned_groups_flat:
            flat.data = own.narrow(0, offset, flat.numel())
            offset += flat.numel()

    def before_reading(self) -> None:
        """Before the first pass after a step: wait until every rank has written its parts. Collective."""
        if not self._is_current:
            self._memory.meet()
            self._written, self._is_current = self._mark(), True

    def before_writing(self) -> None:
        """Before a step, or before anything else writes: wait until no rank reads any more. Collective."""
        self._wait(self._read)
        self._memory.meet()
        self._is_current = False

    @torch.no_grad()
    def gather(self, params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Arriving:
        """Stands for `all_gather_coalesced` of a parameter: start to gather `params`, on the current stream."""
        here = sorted((one for one in params if one.ds_id in self._offsets), key=lambda one: one.ds_id)
        others = [one for one in params if one.ds_id not in self._offsets]
        rest = self._gather_others(others, safe_mode=safe_mode, quantize=quantize) if others else None
        self._wait(self._written)
        for parameter in here:
            if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(parameter.ds_summary())
            parameter.ds_status = ZeroParamStatus.INFLIGHT
            parameter.data = self._whole(parameter).narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)
        self._read = self._mark()
        return Arriving(here, rest)

    def _whole(self, parameter: Any) -> Tensor:
        """All parts of `parameter`, 1-D, the last of them with its padding."""
        size, offset = parameter.ds_tensor.numel(), self._offsets[parameter.ds_id]
        tensors = self._memory.tensors
        whole = torch.empty(size * len(tensors), dtype=parameter.ds_tensor.dtype, device=self._device)
        # Each rank begins with another one's, so that no GPU has all readers at once.
        for step in range(len(tensors)):
            rank = (self._rank + step) % len(tensors)
            whole.narrow(0, rank * size, size).copy_(tensors[rank].narrow(0, offset, size))
        return whole

    def _mark(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream())
        return event

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


class Arriving:
    """Parameters that are gathered. The copies are in the stream already, where DeepSpeed's wait would put them."""

    def __init__(self, parameters: Sequence[Any], rest: Any) -> None:
        self._parameters, self._rest = parameters, rest

    def wait(self, handle_dependency: bool = True) -> None:
        """Say that they are there; again without effect."""
        for parameter in self._parameters:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._parameters = ()
        if self._rest is not None:
            self._rest.wait(handle_dependency=handle_dependency)
