"""ZeRO-3 over parts that the ranks of a host map of each other: each rank copies what it needs, when it needs it.

Parts change when a step or a loaded state writes them, so until then a rank may read those of others without their
help. NCCL's all-gather is a kernel on all of them: it takes multiprocessors from the products beside it, begins when a
product leaves it room, and queues behind the reductions of the backward pass.
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
    """The parts of all parameters, moved into `memory`, from where passes gather them from now on.

    Small parameters that every rank keeps whole are gathered by a collective after each step still.

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
        assert len(parameters) == len(list(optimizer.module.parameters())), "a frozen parameter has no part here"
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
        parameters = sorted(params, key=lambda one: one.ds_id)
        self._wait(self._written)
        wholes = [self._begin(parameter) for parameter in parameters]
        # Each rank begins with the next one's, so that no GPU has all readers at once. Its own come last: copies inside
        # a GPU take multiprocessors, and may wait for them.
        for step in range(1, len(self._memory.tensors) + 1):
            rank = (self._rank + step) % len(self._memory.tensors)
            for parameter, whole in zip(parameters, wholes, strict=True):
                size = parameter.ds_tensor.numel()
                part = self._memory.tensors[rank].narrow(0, self._offsets[parameter.ds_id], size)
                self._copy(whole.narrow(0, rank * size, size), part)
        self._read = self._mark()
        return Arriving(parameters)

    def _begin(self, parameter: Any) -> Tensor:
        """Room for all parts of `parameter`, 1-D, the last of them with its padding, where it finds its values."""
        if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
            raise RuntimeError(parameter.ds_summary())
        parameter.ds_status = ZeroParamStatus.INFLIGHT
        part = parameter.ds_tensor
        whole = torch.empty(part.numel() * len(self._memory.tensors), dtype=part.dtype, device=self._device)
        parameter.data = whole.narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)
        return whole

    def _copy(self, out: Tensor, part: Tensor) -> None:
        out.copy_(part)

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

    def __init__(self, parameters: Sequence[Any]) -> None:
        self._parameters = parameters

    def wait(self, handle_dependency: bool = True) -> None:
        """Say that they are there; again without effect."""
        for parameter in self._parameters:
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._parameters = ()
