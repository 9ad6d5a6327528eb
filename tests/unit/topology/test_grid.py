from __future__ import annotations

import pytest

from engine.config import ParallelConfig
from engine.errors import TopologyError
from engine.topology.grid import AXIS_ORDER, Coord, Grid


def test_tensor_parallel_ranks_are_neighbours_and_stages_are_furthest_apart() -> None:
    grid = Grid(pp=2, dp=3, cp=2, tp=4)
    assert AXIS_ORDER == ("pp", "dp", "cp", "tp")
    assert grid.coord(0) == Coord(pp=0, dp=0, cp=0, tp=0)
    assert grid.coord(1) == Coord(pp=0, dp=0, cp=0, tp=1)
    assert grid.coord(4) == Coord(pp=0, dp=0, cp=1, tp=0)
    assert grid.coord(8) == Coord(pp=0, dp=1, cp=0, tp=0)
    assert grid.coord(24) == Coord(pp=1, dp=0, cp=0, tp=0)


def test_rank_and_coord_are_inverse() -> None:
    grid = Grid(pp=2, dp=3, cp=2, tp=4)
    coords = [grid.coord(rank) for rank in range(grid.world_size)]
    assert len(set(coords)) == grid.world_size == 48
    assert [grid.rank(pp=c.pp, dp=c.dp, cp=c.cp, tp=c.tp) for c in coords] == list(range(48))


def test_groups_of_an_octant() -> None:
    grid = Grid(pp=2, dp=2, tp=2)
    assert grid.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.groups("pp", "tp") == grid.groups("tp", "pp") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert grid.groups("pp", "dp", "tp") == [list(range(8))]
    assert grid.groups() == [[rank] for rank in range(8)]


def test_ranks_that_share_a_sequence_and_those_that_sum_gradients() -> None:
    grid = Grid(dp=2, cp=2, tp=2)
    assert grid.groups("cp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.groups("dp", "cp") == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    "axes", [("tp",), ("dp",), ("pp",), ("pp", "tp"), ("dp", "tp"), ("pp", "dp"), ("cp",), ("dp", "cp")]
)
def test_groups_cover_every_rank_once(axes: tuple[str, ...]) -> None:
    grid = Grid(pp=3, dp=2, cp=2, tp=2)
    groups = grid.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(24))
    for group in groups:
        fixed = {tuple(getattr(grid.coord(r), a) for a in AXIS_ORDER if a not in axes) for r in group}
        assert len(fixed) == 1


def test_from_config_fills_in_dp() -> None:
    assert Grid.from_config(ParallelConfig(pp=2, tp=2), 12) == Grid(pp=2, dp=3, tp=2)
    assert Grid.from_config(ParallelConfig(pp=2, tp=2, dp=3), 12) == Grid(pp=2, dp=3, tp=2)
    assert Grid.from_config(ParallelConfig(tp=2, context=3), 12) == Grid(dp=2, cp=3, tp=2)


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (
            ParallelConfig(pp=2, tp=4),
            12,
            "[OCT202] parallel.pp*parallel.tp=8: pp(2) * tp(4) = 8 does not divide world_size 12. Nearest legal: "
            "'parallel.pp=2 parallel.tp=3', 'parallel.pp=2 parallel.tp=6', 'parallel.pp=3 parallel.tp=4', "
            "or start 16 ranks",
        ),
        (
            ParallelConfig(pp=2, dp=4),
            4,
            "[OCT203] parallel.dp=4: dp=4 asked, but the launcher gave world_size 4 = pp(2) * tp(1) * dp(2). "
            "Use parallel.dp=2, or start 8 ranks",
        ),
        (
            ParallelConfig(context=3),
            4,
            "[OCT202] parallel.pp*parallel.context*parallel.tp=3: pp(1) * context(3) * tp(1) = 3 does not divide "
            "world_size 4. Nearest legal: 'parallel.pp=1 parallel.context=4 parallel.tp=1', "
            "'parallel.pp=1 parallel.context=2 parallel.tp=1', 'parallel.pp=1 parallel.context=2 parallel.tp=2', "
            "or start 3 ranks",
        ),
        (ParallelConfig(tp=0), 4, "[OCT201] parallel.tp=0: a degree is at least 1. Use parallel.tp=1"),
    ],
)
def test_degrees_that_do_not_fit_the_world(parallel: ParallelConfig, world: int, message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Grid.from_config(parallel, world)
    assert message in str(caught.value)


def test_a_grid_without_ranks_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"OCT201\] parallel.dp=0: a degree is at least 1. Use parallel.dp=1"):
        Grid(pp=1, dp=0, tp=1)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_grid(rank: int) -> None:
    with pytest.raises(TopologyError) as caught:
        Grid(pp=2, dp=2, tp=2).coord(rank)
    assert f"[OCT210] rank={rank}: the grid pp(2) * dp(2) * cp(1) * tp(2) has 8 ranks. Use 0..7" in str(caught.value)


def test_coordinates_outside_the_grid_are_all_named() -> None:
    with pytest.raises(TopologyError) as caught:
        Grid(pp=2, dp=2, tp=2).rank(pp=2, dp=0, cp=0, tp=-1)
    assert "[OCT211] pp=2: the pp axis has 2 places. Use 0..1" in str(caught.value)
    assert "[OCT211] tp=-1" in str(caught.value)
    assert len(caught.value.violations) == 2


def test_an_unknown_axis() -> None:
    with pytest.raises(TopologyError, match=r"OCT212\] axis=ep: no such mesh axis. Use one of pp, dp, cp, tp"):
        Grid().groups("tp", "ep")
