"""Rank <-> (pp, dp, cp, tp) arithmetic of the mesh.

Ranks are laid out row-major in `AXIS_ORDER`, outermost first: tensor-parallel ranks are neighbours (same node, fastest
links), then the context-parallel ranks that share a sequence; pipeline stages are furthest apart (they exchange least).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from engine.config.layout import layout_violations
from engine.config.schema import ParallelConfig
from engine.errors import TopologyError, Violation

AXIS_ORDER = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True, slots=True)
class Coord:
    """Position of one rank on the mesh."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True, slots=True)
class Grid:
    """Degrees of the mesh axes, outermost first. Raises `TopologyError` (201) when a degree is below 1."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        parallel = ParallelConfig(pp=self.pp, tp=self.tp, dp=self.dp, context=self.cp)
        found = layout_violations(parallel, self.world_size)
        if found:
            raise TopologyError(found)

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> Grid:
        """The grid that `parallel` means for `world_size` ranks.

        Raises `TopologyError` (201..203) when the degrees do not multiply to `world_size`.
        """
        found = layout_violations(parallel, world_size)
        if found:
            raise TopologyError(found)
        pp, cp, tp = parallel.pp, parallel.context, parallel.tp
        return cls(pp=pp, dp=world_size // (pp * cp * tp), cp=cp, tp=tp)

    @property
    def world_size(self) -> int:
        """Ranks of the whole mesh."""
        return self.pp * self.dp * self.cp * self.tp

    def coord(self, rank: int) -> Coord:
        """Coordinates of `rank`. Raises `TopologyError` (210) when there is no such rank."""
        if not 0 <= rank < self.world_size:
            raise TopologyError.of(
                210,
                "rank",
                rank,
                f"the grid pp({self.pp}) * dp({self.dp}) * cp({self.cp}) * tp({self.tp}) has {self.world_size} ranks",
                f"Use 0..{self.world_size - 1}",
            )
        outer, tp = divmod(rank, self.tp)
        outer, cp = divmod(outer, self.cp)
        pp, dp = divmod(outer, self.dp)
        return Coord(pp=pp, dp=dp, cp=cp, tp=tp)

    def rank(self, *, pp: int, dp: int, cp: int = 0, tp: int) -> int:
        """The rank at these coordinates. Raises `TopologyError` (211) naming every axis that is out of range."""
        asked = (("pp", pp, self.pp), ("dp", dp, self.dp), ("cp", cp, self.cp), ("tp", tp, self.tp))
        found = [
            Violation(
                code=211,
                option=axis,
                value=index,
                rule=f"the {axis} axis has {degree} places",
                way_out=f"Use 0..{degree - 1}",
            )
            for axis, index, degree in asked
            if not 0 <= index < degree
        ]
        if found:
            raise TopologyError(found)
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups of ranks that differ only along `axes`, each ascending, ordered by their first rank.

        `groups("tp")` are the tensor-parallel groups, `groups("pp", "tp")` the replicas of the whole model. Every
        rank is in exactly one group. Raises `TopologyError` (212) on an unknown axis.
        """
        for axis in axes:
            if axis not in AXIS_ORDER:
                raise TopologyError.of(212, "axis", axis, "no such mesh axis", f"Use one of {', '.join(AXIS_ORDER)}")
        fixed = [axis for axis in AXIS_ORDER if axis not in axes]
        found: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for rank in range(self.world_size):
            coord = self.coord(rank)
            found[tuple(getattr(coord, axis) for axis in fixed)].append(rank)
        return list(found.values())
