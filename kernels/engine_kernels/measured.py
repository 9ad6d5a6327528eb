"""The times that `auto` goes by: a small table for each architecture, written by `benchmarks.kernels.table`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from engine_kernels.registry import Situation

TABLE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of forward and backward pass by implementation, and at what they were measured."""

    us: dict[str, float]
    where: str


_NOTHING = Times({}, "")


@cache
def _table() -> dict[str, dict[str, list[dict[str, Any]]]]:
    found: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


@cache
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def times(op: str, situation: Situation) -> Times:
    """The measurement nearest to `situation`: of the same mask, then the nearest head dim, then the nearest length.

    None but for 16-bit tensors on an architecture of the table, and without dropout, windows or a mask for padding,
    which slow down each implementation in its own way.
    """
    s = situation
    sixteen = s.dtype in (torch.bfloat16, torch.float16)
    masked = s.padded and not s.causal and not s.documents
    if s.device.type != "cuda" or not sixteen or s.dropout or s.window or masked:
        return _NOTHING
    rows = _table().get(op, {}).get(_architecture(s.device), [])
    rows = [row for row in rows if (row["causal"], row["documents"]) == (s.causal, s.documents)]
    if not rows:
        return _NOTHING

    def distance(row: dict[str, Any]) -> tuple[float, float]:
        length = s.length or 4096
        return abs(math.log(row["head_dim"] / max(s.head_dim, 1))), abs(math.log(row["length"] / length))

    row = min(rows, key=distance)
    where = f"on {row['hardware']} at head dim {row['head_dim']}, length {row['length']}"
    return Times(row["forward_backward_us"], where)
