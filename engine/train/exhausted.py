"""Memory ran out: which number was asked for, which was free, and what would make the run fit."""

from __future__ import annotations

import re

import torch

from engine.config.schema import Config
from engine.errors import LaunchError
from engine.plan.fit import size_of, ways
from engine.plan.host import available_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation on a device or in host memory that failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The allocator of the CPU, and CUDA where torch's allocator has no part, raise plain RuntimeErrors.
    return isinstance(error, RuntimeError) and re.search(r"can't allocate memory|out of memory", str(error)) is not None


def explained(error: BaseException, cfg: Config, rank: int, world_size: int) -> LaunchError | None:
    """The error for a user when `error` of this rank says that memory ran out (591), else None."""
    if not is_out_of_memory(error):
        return None
    found = ways(cfg, world_size)
    use = f"Use {', or '.join(map(str, found[:4]))}" if found else "Use more ranks, or a smaller model"
    way_out = f"{use}; train.micro_batch=auto finds the largest that fits"
    rule = f"rank {rank} {asked(str(error))}"
    if torch.cuda.is_initialized():
        most = size_of(torch.cuda.max_memory_allocated())
        rule += f"; its tensors took up to {most}, and its allocator held {size_of(torch.cuda.max_memory_reserved())}"
    return LaunchError.of(591, "train.micro_batch", cfg.train.micro_batch, rule, way_out)


def asked(text: str) -> str:
    """What was asked for and what was free, in the words of torch's allocators."""
    device = re.search(
        r"ried to allocate ([\d.]+ \w+)\..*?total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text, re.S
    )
    if device:
        return f"asked its device for {device[1]} more, and {device[3]} of {device[2]} were free"
    host = re.search(r"tried to allocate (\d+) bytes", text)
    said = f"asked for {size_of(int(host[1]))} of the host's memory" if host else "asked for memory of the host"
    free = available_bytes()
    return f"{said} and did not get it" + ("" if free is None else f"; the host has {size_of(free)} free")
