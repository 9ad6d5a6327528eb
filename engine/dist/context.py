"""`ParallelContext`: the grid, this rank's place in it and its process groups, passed to whoever needs them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from engine.config.enums import TpOverlap
from engine.topology.grid import AXIS_ORDER, Coord, Grid


@dataclass(frozen=True, slots=True)
class AxisGroup:
    """The ranks that differ from this one along one axis only.

    `group` is None for a single rank, where every collective is the identity.
    """

    rank: int
    """This rank's coordinate on the axis."""
    size: int
    ranks: tuple[int, ...]
    """Global ranks in axis order."""
    group: dist.ProcessGroup | None
    overlap: TpOverlap = TpOverlap.none
    """How the axis's collectives run beside the products of split linear layers. Never `auto`."""
    name: str = field(init=False, default="")
    """Name of the group, by which operations in compiled graphs find it; empty without a group."""

    def __post_init__(self) -> None:
        if self.group is not None:
            object.__setattr__(self, "name", str(self.group.group_name))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


SINGLE = AxisGroup(rank=0, size=1, ranks=(0,), group=None)
"""The axis of a process that is alone on it."""


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """Everything a layer or an engine may know about the other ranks."""

    grid: Grid
    rank: int
    coord: Coord
    pp: AxisGroup
    dp: AxisGroup
    cp: AxisGroup
    tp: AxisGroup
    replica: AxisGroup
    """All pp x tp ranks that together hold one copy of the parameters."""
    reduce: AxisGroup
    """All dp x cp ranks with the same parameters: gradients are summed over them, and ZeRO shards over them."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def single(cls, device: torch.device | None = None) -> ParallelContext:
        """The context of one process that talks to nobody; no process group is needed."""
        grid = Grid()
        return cls(
            grid=grid,
            rank=0,
            coord=grid.coord(0),
            pp=SINGLE,
            dp=SINGLE,
            cp=SINGLE,
            tp=SINGLE,
            replica=SINGLE,
            reduce=SINGLE,
            device=device or torch.device("cpu"),
        )

    @classmethod
    def create(cls, grid: Grid, device: torch.device) -> ParallelContext:
        """Make this rank's groups. Collective: every rank of the default group calls it with the same grid."""
        rank = dist.get_rank()
        coord = grid.coord(rank)
        axes = {name: _make_groups(grid.groups(name), rank) for name in AXIS_ORDER}
        replica = _make_groups(grid.groups("pp", "tp"), rank) if grid.pp > 1 and grid.tp > 1 else None
        reduce = _make_groups(grid.groups("dp", "cp"), rank) if grid.dp > 1 and grid.cp > 1 else None
        return cls(
            grid=grid,
            rank=rank,
            coord=coord,
            replica=replica or axes["pp" if grid.pp > 1 else "tp"],
            reduce=reduce or axes["dp" if grid.dp > 1 else "cp"],
            device=device,
            **axes,
        )


def _make_groups(members: list[list[int]], rank: int) -> AxisGroup:
    """Create every group of one axis (all ranks must take part in each creation) and keep this rank's."""
    mine: AxisGroup | None = None
    for ranks in members:
        group = dist.new_group(ranks) if len(ranks) > 1 else None
        if rank in ranks:
            mine = AxisGroup(rank=ranks.index(rank), size=len(ranks), ranks=tuple(ranks), group=group)
    assert mine is not None, f"rank {rank} is in none of the groups {members}"
    return mine
