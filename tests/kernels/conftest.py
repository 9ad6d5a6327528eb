"""Every test of this folder runs natively where there is a GPU (marker `gpu`), else in Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

NATIVE = torch.cuda.is_available()
if not NATIVE:
    # Triton reads it when a kernel is defined, which importing a test module does.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    _cast = interpreter.InterpreterBuilder.cast_impl

    def _rounding_cast(builder: Any, source: Any, target: Any) -> Any:
        """The interpreter cuts fp32 off where it becomes bf16; GPUs round to the nearest, ties to even."""
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return _cast(builder, source, target)

    interpreter.InterpreterBuilder.cast_impl = _rounding_cast


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NATIVE and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if NATIVE else "cpu")
