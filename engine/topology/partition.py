"""Cut a list of layers into pipeline stages: the classic linear partition problem, solved exactly.

The slowest stage sets the pace of a pipeline, so the largest stage cost is what is minimised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from engine.errors import TopologyError

# Prefix sums of equal costs differ in the last bits; without this slack such cuts would not count as ties.
_TIE = 1 + 1e-9


def partition(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Stage bounds: stage k holds layers `bounds[k]` to `bounds[k + 1]` (exclusive), none is empty.

    Minimises the largest stage cost. Among the cuts that reach it the layer counts are as even as possible (least sum
    of squares), then early stages get fewer layers: in 1F1B they keep the activations of more micro-batches.

    Raises `TopologyError`: fewer layers than stages or no stage (213), a negative or not finite cost (214).
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        raise TopologyError.of(
            213,
            "parallel.pp",
            stages,
            f"{layers} layers cannot fill {stages} pipeline stages, each holds at least one layer",
            f"Use parallel.pp from 1 to {layers}" if layers else "Give at least one layer",
        )
    for index, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise TopologyError.of(
                214, f"costs[{index}]", cost, "a layer's cost is finite and not negative", "Use 0 for a free layer"
            )
    prefix = [0.0, *accumulate(costs)]
    limit = _best(layers, stages, lambda i, j: prefix[j] - prefix[i], max)[stages][0] * _TIE

    def unevenness(i: int, j: int) -> float:
        return float((j - i) ** 2) if prefix[j] - prefix[i] <= limit else math.inf

    table = _best(layers, stages, unevenness, lambda a, b: a + b)
    bounds = [0]
    for left in range(stages, 0, -1):
        start = bounds[-1]
        ends = range(start + 1, layers - left + 2)
        bounds.append(next(j for j in ends if unevenness(start, j) + table[left - 1][j] == table[left][start]))
    return tuple(bounds)


def even_out(costs: Sequence[float], bounds: Sequence[int], owner: Sequence[int]) -> tuple[int, ...]:
    """The bounds of parts of which stages hold several, part k on `owner[k]`, moved as far as that relieves a stage.

    `partition` makes the parts even, but it is the stage with the most work in all of its parts that sets the pace. A
    bound moves by one layer as long as the largest stage cost gets less and the largest part's does not grow.
    """
    prefix = [0.0, *accumulate(costs)]
    limit = max(prefix[end] - prefix[start] for start, end in pairwise(bounds)) * _TIE

    def largest(cut: Sequence[int]) -> float:
        stages = [0.0] * (max(owner) + 1)
        for (start, end), stage in zip(pairwise(cut), owner, strict=True):
            stages[stage] += prefix[end] - prefix[start]
        return max(stages)

    best = tuple(bounds)
    while True:
        moved = [
            (*best[:k], best[k] + step, *best[k + 1 :])
            for k in range(1, len(best) - 1)
            for step in (-1, 1)
            if best[k - 1] < best[k] + step < best[k + 1]
        ]
        moved = [cut for cut in moved if all(prefix[end] - prefix[start] <= limit for start, end in pairwise(cut))]
        better = min(moved, key=largest, default=best)
        if largest(better) * _TIE >= largest(best):
            return best
        best = better


def _best(
    layers: int, stages: int, stage_cost: Callable[[int, int], float], join: Callable[[float, float], float]
) -> list[list[float]]:
    """Dynamic programming over suffixes: entry [k][i] is the least cost of cutting layers i.. into k stages."""
    table = [[math.inf] * layers + [0.0]]
    for k in range(1, stages + 1):
        row = [math.inf] * (layers + 1)
        for i in range(layers - k + 1):
            row[i] = min(join(stage_cost(i, j), table[k - 1][j]) for j in range(i + 1, layers - k + 2))
        table.append(row)
    return table
