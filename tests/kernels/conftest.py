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

    def rounded(values: Any, source: Any, target: Any, mode: Any, convert: Any = interpreter._convert_float) -> Any:
        """The interpreter cuts off where the hardware rounds to the nearest, and then to even."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, up).astype(np.uint16).reshape(values.shape)

    interpreter._convert_float = rounded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NATIVE and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if NATIVE else "cpu")
