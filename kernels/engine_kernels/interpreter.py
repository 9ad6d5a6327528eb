"""Whether Triton's kernels run in its interpreter, which needs no GPU."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """TRITON_INTERPRET=1 is set; Triton reads it when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
