from __future__ import annotations

import itertools
import math
import random

import pytest

from engine.errors import TopologyError
from engine.topology.partition import even_out, partition


def stage_costs(costs: list[float], bounds: tuple[int, ...]) -> list[float]:
    return [math.fsum(costs[a:b]) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("seed", range(30))
def test_no_cut_has_a_smaller_largest_stage(seed: int) -> None:
    rng = random.Random(seed)
    costs = [rng.choice([0.0, 1.0, rng.uniform(0, 10)]) for _ in range(rng.randint(1, 9))]
    stages = rng.randint(1, len(costs))
    bounds = partition(costs, stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert len(bounds) == stages + 1
    assert all(a < b for a, b in itertools.pairwise(bounds))
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    best = min(max(stage_costs(costs, (0, *cut, len(costs)))) for cut in cuts)
    assert max(stage_costs(costs, bounds)) == pytest.approx(best, rel=1e-8)


def test_equal_costs_give_even_counts_with_fewer_layers_in_front() -> None:
    assert partition([1.0] * 8, 4) == (0, 2, 4, 6, 8)
    assert partition([1.0] * 10, 4) == (0, 2, 4, 7, 10)


def test_rounding_does_not_break_ties() -> None:
    assert partition([0.1] * 10, 3) == partition([1.0] * 10, 3) == (0, 3, 6, 10)


def test_free_layers_are_spread_evenly_too() -> None:
    assert partition([0.0] * 6, 3) == (0, 2, 4, 6)


def test_a_heavy_embedding_stands_alone() -> None:
    assert partition([100.0, *[1.0] * 6], 3) == (0, 1, 4, 7)


def test_parts_make_even_stages() -> None:
    # A head that costs 1.64 blocks: parts of 7, 9, 9 and 8.64 give the second of two stages 10 % more than the first.
    costs = [*[0.0] * 2, *[1.0] * 32, 0.0, 1.64]
    parts = partition(costs, 4)
    bounds = even_out(costs, parts, (0, 1, 0, 1))
    a, b, c, d = stage_costs(costs, bounds)
    assert max(a + c, b + d) == pytest.approx(17.0)
    assert max(stage_costs(costs, parts)[0::2]) < 17.0 < sum(stage_costs(costs, parts)[1::2])
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)


@pytest.mark.parametrize("seed", range(20))
def test_evening_out_never_makes_a_stage_larger_or_a_part_empty(seed: int) -> None:
    rng = random.Random(seed)
    costs = [rng.choice([0.0, 1.0, rng.uniform(0, 4)]) for _ in range(rng.randint(6, 14))]
    for owner in ((0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 2, 0, 1, 2)):
        before = partition(costs, len(owner))
        after = even_out(costs, before, owner)
        assert all(a < b for a, b in itertools.pairwise(after))

        def largest(bounds: tuple[int, ...], owner: tuple[int, ...] = owner) -> float:
            parts = stage_costs(costs, bounds)
            return max(sum(c for c, o in zip(parts, owner, strict=True) if o == stage) for stage in set(owner))

        assert largest(after) <= largest(before) * (1 + 1e-12)
        assert max(stage_costs(costs, after)) <= max(stage_costs(costs, before)) * (1 + 1e-8)


def test_one_part_per_stage_is_even_already() -> None:
    costs = [3.0, 1.0, 1.0, 1.0, 2.0]
    assert even_out(costs, partition(costs, 3), (0, 1, 2)) == partition(costs, 3)


@pytest.mark.parametrize(("layers", "stages"), [(3, 4), (3, 0), (0, 1)])
def test_fewer_layers_than_stages(layers: int, stages: int) -> None:
    with pytest.raises(TopologyError) as caught:
        partition([1.0] * layers, stages)
    assert f"[OCT213] parallel.pp={stages}: {layers} layers cannot fill {stages} pipeline stages" in str(caught.value)
    assert ("from 1 to 3" if layers else "at least one layer") in caught.value.violations[0].way_out


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_costs_that_cannot_be_added_up(cost: float) -> None:
    with pytest.raises(TopologyError) as caught:
        partition([1.0, cost], 1)
    assert f"[OCT214] costs[1]={cost}: a layer's cost is finite and not negative. Use 0" in str(caught.value)
