"""Every test of this folder runs natively where there is a GPU (marker `gpu`), else in Triton's interpreter.

Triton decides between the two when a kernel is defined, for the whole process: without a GPU the folder runs alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent
NATIVE = torch.cuda.is_available()
_named = [path.resolve() for word in sys.argv[1:] if (path := Path(word.split("::")[0])).exists()]
if not NATIVE and _named and all(FOLDER in (path, *path.parents) for path in _named):
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = not NATIVE and os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    alone = pytest.mark.skip(reason="needs a GPU, or a process of its own: pytest tests/kernels")
    for item in items:
        if FOLDER not in item.path.resolve().parents:
            continue
        if NATIVE:
            item.add_marker(pytest.mark.gpu)
        elif not INTERPRETED:
            item.add_marker(alone)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if NATIVE else "cpu")
