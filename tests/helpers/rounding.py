"""Triton's interpreter cuts fp32 off where it becomes bf16; GPUs round to the nearest, and so it does with this."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def round_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test, kernels in the interpreter round bf16 to nearest, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(builder: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(builder, source, target)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)
