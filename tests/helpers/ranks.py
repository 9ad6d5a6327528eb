"""Several ranks for a test: `run_ranks(fn, world_size, args)` calls a module-level function on each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from engine.dist.spawn import RankFailure, backend_of
from engine.dist.spawn import run_ranks as _run_ranks
from engine.study.parity import PRELOAD

__all__ = ["RankFailure", "backend_of", "run_ranks"]

run_ranks: Callable[..., list[Any]] = partial(_run_ranks, preload=PRELOAD)
