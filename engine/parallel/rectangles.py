"""Stretches of a rank's slice as rectangles of the logical tensor: where in it each element stands.

A tensor is seen as a matrix: its first dim is the rows, the others together are the columns. ZeRO cuts the flattened
slice anywhere, so a stretch is a part of a row, whole rows, and a part of a row again; tensor parallelism cuts the
logical rows or columns into the slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from engine.parallel.logical import LogicalTensor


class Rectangle(NamedTuple):
    """Rows and columns of a logical matrix, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    @property
    def size(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def intersection(self, other: Rectangle) -> Rectangle | None:
        """What both cover; None: nothing."""
        found = Rectangle(
            max(self.top, other.top),
            min(self.bottom, other.bottom),
            max(self.left, other.left),
            min(self.right, other.right),
        )
        return found if found.top < found.bottom and found.left < found.right else None


@dataclass(frozen=True, slots=True)
class Patch:
    """A rectangle of the logical matrix in a stretch of elements: its first one at `offset`, rows `stride` apart."""

    rectangle: Rectangle
    offset: int
    stride: int


@dataclass(frozen=True, slots=True)
class _Run:
    """`size` rows (or columns) from `local` on of the slice are those from `logical` on of the whole."""

    local: int
    logical: int
    size: int


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor of `shape` as a matrix; a scalar is one row of one column."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def patches(
    logical: LogicalTensor, local_shape: Sequence[int], start: int, size: int, *, rank: int, ranks: int
) -> Iterator[Patch]:
    """The rectangles of `size` elements from `start` on of a flattened slice; padding is in none of them.

    Args:
        local_shape: of the slice that tensor-parallel rank `rank` of `ranks` holds.

    Offsets count from the stretch's first element.
    """
    height, width = matrix_shape(local_shape)
    rows, columns = matrix_shape(logical.shape)
    by_row, by_column = [_Run(0, 0, min(height, rows))], [_Run(0, 0, min(width, columns))]
    if logical.dim == 0:
        by_row = _runs(logical, rank, ranks)
    elif logical.dim is not None:
        by_column = _runs(logical, rank, ranks)
    for band in _bands(start, size, width):
        for vertical in by_row:
            top, bottom = max(band.top, vertical.local), min(band.bottom, vertical.local + vertical.size)
            for across in by_column:
                left, right = max(band.left, across.local), min(band.right, across.local + across.size)
                if top < bottom and left < right:
                    down, aside = vertical.logical - vertical.local, across.logical - across.local
                    found = Rectangle(top + down, bottom + down, left + aside, right + aside)
                    yield Patch(found, top * width + left - start, width)


def _runs(logical: LogicalTensor, rank: int, ranks: int) -> list[_Run]:
    """What `LogicalTensor.local_slice` takes along the dim that is cut, without what is padding."""
    assert logical.dim is not None
    end = logical.shape[logical.dim]
    found: list[_Run] = []
    local = whole = 0
    for segment in logical.segments or (logical.padded or end,):
        part = segment // ranks
        begin = whole + rank * part
        kept = min(part, end - begin)
        last = found[-1] if found else None
        if last is not None and last.local + last.size == local and last.logical + last.size == begin:
            found[-1] = _Run(last.local, last.logical, last.size + kept)
        elif kept > 0:
            found.append(_Run(local, begin, kept))
        local, whole = local + part, whole + segment
    return found


def _bands(start: int, size: int, width: int) -> Iterator[Rectangle]:
    """A stretch of a matrix `width` columns wide: the end of a row, whole rows, the beginning of a row."""
    end = start + size
    while start < end:
        row, column = divmod(start, width)
        if column or end - start < width:
            stop = min(end, (row + 1) * width)
            yield Rectangle(row, row + 1, column, column + stop - start)
        else:
            stop = end - end % width
            yield Rectangle(row, stop // width, 0, width)
        start = stop
