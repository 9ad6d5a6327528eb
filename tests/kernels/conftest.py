"""Every test of this folder runs natively where there is a GPU (marker `gpu`), else in Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

NATIVE = torch.cuda.is_available()
if not NATIVE:
    # Triton reads it when a kernel is defined, which importing a test module does.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NATIVE and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if NATIVE else "cpu")
