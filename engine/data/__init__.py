"""Corpora, tokenizers, token files and the order of samples.

`prepare` turns sources into cache entries once; `open_data` memory-maps them; `Split.micro_batches` reads them. No
process group is needed: which replica reads which sample is arithmetic (`engine.data.samples.sampler`).
Errors have codes OCT401-474.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.data.build.prepare import prepare
    from engine.data.samples.batches import Split
    from engine.data.samples.sampler import sample_numbers
    from engine.data.source import Data, open_data

__all__ = ["Data", "Split", "open_data", "prepare", "sample_numbers"]

# Imported when asked for: the processes that build token files must not wait for torch.
_HOMES = {
    "Data": "source",
    "Split": "samples.batches",
    "open_data": "source",
    "prepare": "build.prepare",
    "sample_numbers": "samples.sampler",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
