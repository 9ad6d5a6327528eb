"""Whether Triton's kernels run in its interpreter, which needs no GPU."""

from __future__ import annotations

import os

from torch import Tensor


def interpreted() -> bool:
    """TRITON_INTERPRET=1 is set; Triton reads it when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def require_gpu(name: str, x: Tensor) -> None:
    """Raise ValueError where no kernel of Triton can run on `x`."""
    if x.device.type != "cuda" and not interpreted():
        raise ValueError(f"{name} is on {x.device}: Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set")
