"""Memory that processes of one host map of each other, for CPUs: stands for `engine.parallel.symmetric.Mapped`."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import AxisGroup


class SharedFiles:
    """A file in memory for each rank of `axis`, mapped by all. Collective."""

    def __init__(
        self, elements: int, dtype: torch.dtype, device: torch.device, axis: AxisGroup, timeout_s: float
    ) -> None:
        assert device.type == "cpu"
        self._group = axis.group
        handle, path = tempfile.mkstemp(dir="/dev/shm")
        os.close(handle)
        os.truncate(path, elements * dtype.itemsize)
        paths = [""] * axis.size
        dist.all_gather_object(paths, path, group=axis.group)
        self.tensors: list[Tensor] = [torch.from_file(path, shared=True, size=elements, dtype=dtype) for path in paths]
        self.meet()
        os.unlink(path)

    def meet(self) -> None:
        dist.barrier(self._group)
