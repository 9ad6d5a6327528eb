"""A tensor of transformers as a part of one of ours: a renaming, and at most another order of its elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of transformers that is a part of a logical tensor: its rows from `start` to `stop` (None: to the end).

    `transposed`: stored as (in, out) where ours is (out, in). `heads`: rows of a fused query, key and value are stored
    head by head, (heads, 3, H, ...), where ours are (3, heads, H, ...); 0: in one order. `also`: further names of the
    same values.
    """

    name: str
    start: int = 0
    stop: int | None = None
    transposed: bool = False
    heads: int = 0
    also: tuple[str, ...] = ()

    def shape(self, logical: Sequence[int]) -> tuple[int, ...]:
        """Its shape, where the logical tensor has shape `logical`."""
        rows = (logical[0] if self.stop is None else self.stop) - self.start
        shape = (rows, *logical[1:])
        return shape[::-1] if self.transposed else shape

    def turned(self, rows: Tensor) -> Tensor:
        """Rows of ours in their layout."""
        rows = _exchanged(rows, 3, self.heads) if self.heads else rows
        return rows.T if self.transposed else rows

    def turned_back(self, value: Tensor) -> Tensor:
        """Their tensor as rows of ours."""
        rows = value.T if self.transposed else value
        return _exchanged(rows, self.heads, 3) if self.heads else rows


HFNames = dict[str, tuple[Stored, ...]]
"""Each logical tensor's parts, in the order of their rows."""


def _exchanged(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Rows in the order (outer, inner, H) brought into the order (inner, outer, H)."""
    return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)
