"""Options of the device that a run is for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    """One device, and its node. None: not known, or what the device itself says when the run starts."""

    name: str = "auto"
    """Name of the preset. `auto`: the one of `conf/hardware/` whose pattern is the name of the device that is found."""
    pattern: str | None = None
    """Regular expression of the whole name that `torch.cuda.get_device_name` gives, without the leading "NVIDIA "."""
    memory_gib: float | None = None
    """Memory of the device that a program can allocate, or of one rank on the CPU. More than the device has is not
    believed; less bounds the search of `train.micro_batch=auto`."""
    bf16_tflops: float | None = None
    """Dense peak in bf16 with fp32 accumulation, TFLOP/s, of which MFU is a share."""
    memory_gb_s: float | None = None
    """Bandwidth of the device's memory, GB/s."""
    link_gb_s: float | None = None
    """Bandwidth between the devices of a node, both directions together, GB/s."""
    host_memory_gib: float | None = None
    """Memory of the host."""
    margin_gib: float | None = None
    """Memory of the device that a plan, and the search of `train.micro_batch=auto`, leave free. None: 5 % of it."""
