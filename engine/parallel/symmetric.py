"""What is used of torch's symmetric memory: copy engines move rows between GPUs of one host.

Its own operations that gather and multiply would copy batches of more than one sequence, so this takes the functions
below them. Rows are (M, K). All work in one buffer per group, so none may run beside another; those that only start run
one after the other on one stream.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import AxisGroup
from engine.errors import LaunchError


def library() -> Any:
    """torch's symmetric memory, which is private so far."""
    # Nothing here uses NVLink's multicast, and hosts exist where setting it up breaks the switch.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    # Not where it is unused: it is for CUDA.
    import torch.distributed._symmetric_memory as library

    return library


def require_mapped(axis: AxisGroup, device: torch.device, option: str, value: str, instead: str) -> None:
    """Refuse `option` where the ranks of `axis` cannot map each other's memory. Collective over the axis.

    Raises:
        LaunchError: 515 they are CPUs, or on several hosts.
    """
    if device.type != "cuda":
        rule = "copy engines are GPUs', and this run is on CPUs"
        raise LaunchError.of(515, option, value, rule, f"Use {option}=auto")
    hosts: list[Any] = [""] * axis.size
    dist.all_gather_object(hosts, socket.gethostname(), group=axis.group)
    if len(set(hosts)) > 1:
        where = ", ".join(sorted(set(hosts)))
        rule = f"GPUs map each other's memory inside a host, and these {axis.size} ranks are on {where}"
        raise LaunchError.of(515, option, value, rule, f"Use {option}={instead}")


class Mapped:
    """A 1-D tensor of equal size on every rank of `axis`, each of which maps those of all. Collective.

    Attributes:
        tensors: (elements,) of each rank, in rank order. Copies from another rank's are copy engines' work.
    """

    def __init__(
        self, elements: int, dtype: torch.dtype, device: torch.device, axis: AxisGroup, timeout_s: float
    ) -> None:
        if device.type == "cuda":
            # Its memory comes from the driver, which does not ask torch's allocator for what that keeps in reserve.
            torch.cuda.empty_cache()
        own = library().empty(elements, dtype=dtype, device=device)
        self.memory: Any = library().rendezvous(own, axis.group)
        self.tensors: list[Tensor] = [
            own if rank == axis.rank else self.memory.get_buffer(rank, (elements,), dtype) for rank in range(axis.size)
        ]
        self.timeout_ms = round(1000 * timeout_s)
        _sizes[self] = own.nbytes

    def meet(self) -> None:
        """Let the current stream wait for those of all ranks, at most `timeout_s`: then the device reports an error."""
        self.memory.barrier(timeout_ms=self.timeout_ms)


_sizes: WeakKeyDictionary[Mapped, int] = WeakKeyDictionary()


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors took on `device` at a time; 0 on CPUs.

    With what this rank holds in `Mapped`, of which torch's allocator does not know.
    """
    return torch.cuda.max_memory_allocated(device) + sum(_sizes.values()) if device.type == "cuda" else 0


def start_all_gather(rows: Tensor, group: str) -> Callable[[], Tensor]:
    """The ranks' rows in rank order, (t M, K), once the result is called."""
    library()
    arriving = torch.ops.symm_mem._low_contention_all_gather(rows, group)
    return lambda: _wait(arriving, rows)


def start_reduce_scatter(rows: Tensor, group: str) -> Callable[[], Tensor]:
    """This rank's block (M/t, K) of the sum of the ranks' rows, once the result is called."""
    library()
    arriving = torch.ops.symm_mem._low_contention_reduce_scatter(rows, "sum", group)
    return lambda: _wait(arriving, rows)


def _wait(arriving: Tensor, read: Tensor) -> Tensor:
    """`read` is held until then: it is read on a stream of which its memory does not know."""
    done: Tensor = torch.ops._c10d_functional.wait_tensor(arriving)
    return done


def gather_and_consume(
    rows: Tensor, consume: Callable[[Tensor, int], None], gathered: Tensor, group: str, keep: bool
) -> None:
    """`consume(rows of a rank, rank)`, its own first, the others' as they arrive; in `gathered`, with `keep` all."""
    library()._pipelined_all_gather_and_consume(rows, consume, gathered, group, keep)


def produce_and_exchange(produce: Callable[[int, Tensor], None], received: Tensor, group: str) -> None:
    """`produce(rank, out)` fills the rows for each rank, the own last; `received` gets those of all, in rank order."""
    library()._pipelined_produce_and_all2all(produce, received, group)
