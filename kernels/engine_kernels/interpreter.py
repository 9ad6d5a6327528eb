"""Whether Triton's kernels run in its interpreter, which needs no GPU, and what it has to be taught."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


def interpreted() -> bool:
    """TRITON_INTERPRET=1 is set; Triton reads it when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def require_gpu(name: str, x: Tensor) -> None:
    """Raise ValueError where no kernel of Triton can run on `x`."""
    if x.device.type != "cuda" and not interpreted():
        raise ValueError(f"{name} is on {x.device}: Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set")


def round_to_bf16() -> None:
    """Let the interpreter round fp32 to the nearest bf16, ties to even, as GPUs do; by itself it cuts fp32 off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    builder.cast_impl = cast_impl
