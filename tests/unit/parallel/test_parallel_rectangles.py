"""Where the elements of a stretch of a slice stand in the logical tensor: every one of them, exactly once."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.parallel.logical import LogicalTensor
from engine.parallel.rectangles import Patch, Rectangle, matrix_shape, patches

LOGICAL = {
    "rows": LogicalTensor((12, 5), dim=0),
    "columns": LogicalTensor((5, 12), dim=1),
    "vector": LogicalTensor((12,), dim=0),
    "fused": LogicalTensor((32, 3), dim=0, segments=(24, 4, 4)),
    "fused vector": LogicalTensor((32,), dim=0, segments=(24, 4, 4)),
    "fused columns": LogicalTensor((3, 16), dim=1, segments=(4, 8, 4)),
    "padded": LogicalTensor((9, 3), dim=0, padded=16),
    "padded past whole ranks": LogicalTensor((3, 2), dim=0, padded=16),
    "padded vector": LogicalTensor((5,), dim=0, padded=8),
    "replicated": LogicalTensor((7, 3)),
    "replicated vector": LogicalTensor((7,)),
    "three dims": LogicalTensor((4, 3, 2), dim=0),
    "scalar": LogicalTensor(()),
}
by_kind = pytest.mark.parametrize("logical", LOGICAL.values(), ids=LOGICAL.keys())


def numbered(logical: LogicalTensor) -> Tensor:
    """Element i holds i + 1, so that 0 is padding."""
    return torch.arange(1.0, 1 + torch.Size(logical.shape).numel()).view(logical.shape)


def cuts(size: int, draw: random.Random) -> list[tuple[int, int]]:
    """Random stretches (start, size) that together are `size` elements; some may be empty."""
    places = sorted(draw.randint(0, size) for _ in range(draw.randint(0, 4)))
    ends = [0, *places, size]
    return [(start, end - start) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def stretches(logical: LogicalTensor, ranks: int, draw: random.Random) -> Iterator[tuple[Tensor, list[Patch]]]:
    """Each stretch of each rank that counts, and its patches; ranks that hold the same are looked at once."""
    full = numbered(logical)
    for rank in range(ranks if logical.dim is not None else 1):
        local = logical.local_slice(full, rank, ranks)
        for start, size in cuts(local.numel(), draw):
            flat = local.reshape(-1)[start : start + size]
            yield flat, list(patches(logical, local.shape, start, size, rank=rank, ranks=ranks))


def taken(flat: Tensor, patch: Patch) -> Tensor:
    return flat.as_strided(patch.rectangle.shape, (patch.stride, 1), flat.storage_offset() + patch.offset)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@by_kind
def test_patches_tile_the_logical_tensor_once_and_put_its_values_back(logical: LogicalTensor, ranks: int) -> None:
    draw = random.Random(f"{logical} {ranks}")
    matrix = numbered(logical).view(matrix_shape(logical.shape))
    for _ in range(25):
        found, times = torch.zeros_like(matrix), torch.zeros_like(matrix)
        for flat, parts in stretches(logical, ranks, draw):
            assert sum(part.rectangle.size for part in parts) == int((flat != 0).sum()), "padding is in none"
            for part in parts:
                top, bottom, left, right = part.rectangle
                found[top:bottom, left:right] = taken(flat, part)
                times[top:bottom, left:right] += 1
        assert torch.equal(times, torch.ones_like(times))
        assert torch.equal(found, matrix)


@pytest.mark.parametrize("ranks", [2, 4])
@by_kind
def test_a_stretch_is_few_patches(logical: LogicalTensor, ranks: int) -> None:
    """A part of a row, whole rows and a part of a row, each at most once for each segment."""
    draw = random.Random(3)
    for _ in range(25):
        for _, parts in stretches(logical, ranks, draw):
            assert len(parts) <= 3 * max(1, len(logical.segments))


def test_a_stretch_that_begins_and_ends_inside_rows() -> None:
    logical = LogicalTensor((8, 5), dim=0)
    # Rank 1 of 2 holds rows 4 to 7; from its element 3 on: two of row 4, rows 5 and 6, one of row 7.
    assert list(patches(logical, (4, 5), 3, 13, rank=1, ranks=2)) == [
        Patch(Rectangle(4, 5, 3, 5), 0, 5),
        Patch(Rectangle(5, 7, 0, 5), 2, 5),
        Patch(Rectangle(7, 8, 0, 1), 12, 5),
    ]


def test_rows_of_a_column_slice_lie_the_slices_width_apart() -> None:
    logical = LogicalTensor((3, 8), dim=1)
    assert list(patches(logical, (3, 4), 0, 12, rank=1, ranks=2)) == [Patch(Rectangle(0, 3, 4, 8), 0, 4)]


def test_one_rank_holds_a_fused_tensor_in_one_patch() -> None:
    logical = LogicalTensor((32, 3), dim=0, segments=(24, 4, 4))
    assert list(patches(logical, (32, 3), 0, 96, rank=0, ranks=1)) == [Patch(Rectangle(0, 32, 0, 3), 0, 3)]


def test_a_slice_of_padding_alone_has_no_patch() -> None:
    logical = LogicalTensor((3, 2), dim=0, padded=16)
    assert list(patches(logical, (4, 2), 0, 8, rank=3, ranks=4)) == []


def test_an_empty_stretch_has_no_patch() -> None:
    assert list(patches(LogicalTensor((4, 3)), (4, 3), 5, 0, rank=0, ranks=1)) == []


@pytest.mark.parametrize(
    ("other", "common"),
    [
        (Rectangle(0, 9, 0, 9), Rectangle(2, 5, 3, 7)),
        (Rectangle(3, 4, 4, 5), Rectangle(3, 4, 4, 5)),
        (Rectangle(4, 9, 0, 4), Rectangle(4, 5, 3, 4)),
        (Rectangle(5, 9, 3, 7), None),
        (Rectangle(2, 5, 0, 3), None),
    ],
)
def test_rectangles_share_what_both_cover(other: Rectangle, common: Rectangle | None) -> None:
    mine = Rectangle(2, 5, 3, 7)
    assert (mine.shape, mine.size) == ((3, 4), 12)
    assert mine.intersection(other) == other.intersection(mine) == common


@pytest.mark.parametrize(("shape", "matrix"), [((), (1, 1)), ((4,), (4, 1)), ((4, 3), (4, 3)), ((4, 3, 2), (4, 6))])
def test_tensors_are_seen_as_matrices(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert matrix_shape(shape) == matrix
