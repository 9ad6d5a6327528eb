"""`python -m engine.study STUDY [options] [overrides]`."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from engine.config import entry
from engine.config.enums import Device
from engine.dist.init import resolve_device_type
from engine.errors import LaunchError, nearest

STUDIES = ("parity", "timeline", "network", "rank")
"""Modules of this package."""
_IMPORT_DEEPSPEED = ("parity", "timeline")


def main(argv: list[str]) -> int:
    """Exit code: 0 passed, 1 a study found a miss, 2 refused, 130 interrupted."""
    return entry.run(lambda: _study(argv))


def _study(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m engine.study STUDY [options] [overrides]\nstudies: " + ", ".join(STUDIES))
        return 0
    if argv[0] not in STUDIES:
        raise LaunchError.of(520, "study", argv[0], "no such study", nearest(argv[0], STUDIES))
    if argv[0] in _IMPORT_DEEPSPEED:
        # Without a word it guesses its accelerator then, and prints the guess. For those alone: to look for a GPU is to
        # begin with CUDA, and from then on launches are in no other order.
        os.environ.setdefault("DS_ACCELERATOR", resolve_device_type(Device.auto))
    code: int = import_module(f"engine.study.{argv[0]}").main(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
