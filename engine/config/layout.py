"""Rules for the degrees pp, tp and dp: one place for the arithmetic and its messages (codes 2xx)."""

from __future__ import annotations

import math

from engine.config.derived import ffn_size, kv_heads
from engine.config.schema import ModelConfig, ParallelConfig
from engine.errors import Violation


def divisors(n: int) -> list[int]:
    """Positive divisors of `n` in ascending order; none for n < 1."""
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def legal_tp(model: ModelConfig) -> list[int]:
    """Tensor-parallel degrees that divide the query heads, the key/value heads and the feed-forward width."""
    sizes = [n for n in (model.num_heads, kv_heads(model), ffn_size(model)) if n > 0]
    return divisors(math.gcd(*sizes)) if sizes else [1]


def legal_pairs(world_size: int, model: ModelConfig | None = None) -> list[tuple[int, int]]:
    """All (pp, tp) whose product divides `world_size` and, with a model, that the model can be cut into."""
    degrees = divisors(world_size)
    tps = degrees if model is None else sorted(set(degrees) & set(legal_tp(model)))
    most = world_size if model is None else max(model.num_layers, 1)
    return [(pp, tp) for pp in degrees for tp in tps if pp <= most and world_size % (pp * tp) == 0]


def nearest_pairs(pp: int, tp: int, world_size: int, model: ModelConfig | None = None, limit: int = 3) -> str:
    """The legal (pp, tp) closest to what was asked (in powers of two), as they are typed."""

    def distance(pair: tuple[int, int]) -> tuple[float, int, int]:
        steps = abs(math.log2(pair[0] / max(pp, 1))) + abs(math.log2(pair[1] / max(tp, 1)))
        return (round(steps, 6), -pair[0] * pair[1], pair[0])

    pairs = sorted(legal_pairs(world_size, model), key=distance)[:limit]
    return ", ".join(f"'parallel.pp={p} parallel.tp={t}'" for p, t in pairs)


def layout_violations(parallel: ParallelConfig, world_size: int, model: ModelConfig | None = None) -> list[Violation]:
    """Every way in which the degrees do not fit `world_size` (codes 201..203).

    With `model`, the nearest layouts offered are also legal for that model.
    """
    pp, tp, dp = parallel.pp, parallel.tp, parallel.dp
    found = [
        Violation(
            code=201,
            option=f"parallel.{axis}",
            value=degree,
            rule="a degree is at least 1",
            way_out=f"Use parallel.{axis}=1",
        )
        for axis, degree in (("pp", pp), ("tp", tp), ("dp", dp))
        if degree is not None and degree < 1
    ]
    if found:
        return found
    if dp is not None and pp * tp * dp != world_size:
        found.append(_dp_violation(parallel, dp, world_size, model))
    elif world_size % (pp * tp):
        found.append(
            Violation(
                code=202,
                option="parallel.pp*parallel.tp",
                value=pp * tp,
                rule=f"pp({pp}) * tp({tp}) = {pp * tp} does not divide world_size {world_size}",
                way_out=f"Nearest legal: {nearest_pairs(pp, tp, world_size, model)}, "
                f"or start {_ranks(pp * tp * max(1, round(world_size / (pp * tp))))}",
            )
        )
    return found


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _dp_violation(parallel: ParallelConfig, dp: int, world_size: int, model: ModelConfig | None) -> Violation:
    """parallel.dp was set, but the launcher's world has another size."""
    pp, tp = parallel.pp, parallel.tp
    given, rest = divmod(world_size, pp * tp)
    if rest:
        rule = f"world_size {world_size} is not a multiple of pp({pp}) * tp({tp}) = {pp * tp}"
        way_out = f"Leave parallel.dp unset and use {nearest_pairs(pp, tp, world_size, model)}"
    else:
        rule = f"the launcher gave world_size {world_size} = pp({pp}) * tp({tp}) * dp({given})"
        way_out = f"Use parallel.dp={given}"
    return Violation(
        code=203,
        option="parallel.dp",
        value=dp,
        rule=f"dp={dp} asked, but {rule}",
        way_out=f"{way_out}, or start {_ranks(pp * tp * dp)}",
    )
