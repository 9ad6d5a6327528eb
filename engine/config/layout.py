"""Rules for the degrees pp, dp, context and tp: one place for the arithmetic and its messages (codes 201..203).

A layout is a triple (pp, context, tp); dp is what the world leaves over.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from engine.config.derived import ffn_size, kv_heads
from engine.config.schema import ModelConfig, ParallelConfig
from engine.errors import Violation

Fits = Callable[[int, int, int], bool]
"""Whether the rest of a config can run with (pp, context, tp)."""


def divisors(n: int) -> list[int]:
    """Positive divisors of `n` in ascending order; none for n < 1."""
    small = [d for d in range(1, math.isqrt(max(n, 0)) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def legal_tp(model: ModelConfig) -> list[int]:
    """Tensor-parallel degrees that divide the query heads, the key/value heads and the feed-forward width."""
    sizes = [n for n in (model.num_heads, kv_heads(model), ffn_size(model)) if n > 0]
    return divisors(math.gcd(*sizes)) if sizes else [1]


def legal_layouts(world_size: int, fits: Fits | None = None, *, context: bool = False) -> list[tuple[int, int, int]]:
    """All (pp, context, tp) whose product divides `world_size` and that `fits` takes; context is 1 unless asked for."""
    degrees = divisors(world_size)
    return [
        (pp, cp, tp)
        for pp in degrees
        for cp in (degrees if context else [1])
        for tp in degrees
        if world_size % (pp * cp * tp) == 0 and (fits is None or fits(pp, cp, tp))
    ]


def nearest_layouts(parallel: ParallelConfig, world_size: int, fits: Fits | None = None, limit: int = 3) -> str:
    """The legal layouts closest to `parallel` (in powers of two) as they are typed, or "none"."""
    pp, cp, tp = (max(degree, 1) for degree in (parallel.pp, parallel.context, parallel.tp))

    def distance(layout: tuple[int, int, int]) -> tuple[float, int, int]:
        steps = sum(abs(math.log2(got / asked)) for got, asked in zip(layout, (pp, cp, tp), strict=True))
        return (round(steps, 6), -math.prod(layout), layout[0])

    found = sorted(legal_layouts(world_size, fits, context=cp > 1), key=distance)[:limit]
    return ", ".join(f"'{typed(*layout, context=cp > 1)}'" for layout in found) or "none"


def typed(pp: int, cp: int, tp: int, *, context: bool) -> str:
    """A layout as overrides; `context` says whether that degree is named."""
    middle = f"parallel.context={cp} " if context else ""
    return f"parallel.pp={pp} {middle}parallel.tp={tp}"


def layout_violations(parallel: ParallelConfig, world_size: int, fits: Fits | None = None) -> list[Violation]:
    """Every way in which the degrees do not fit `world_size` (codes 201..203).

    With `fits`, the nearest layouts offered also suit the rest of the config.
    """
    pp, cp, tp, dp = parallel.pp, parallel.context, parallel.tp, parallel.dp
    found = [
        Violation(
            code=201,
            option=f"parallel.{axis}",
            value=degree,
            rule="a degree is at least 1",
            way_out=f"Use parallel.{axis}=1",
        )
        for axis, degree in (("pp", pp), ("context", cp), ("tp", tp), ("dp", dp))
        if degree is not None and degree < 1
    ]
    if found:
        return found
    size = pp * cp * tp
    if dp is not None and size * dp != world_size:
        found.append(_dp_violation(parallel, dp, world_size, fits))
    elif world_size % size:
        found.append(
            Violation(
                code=202,
                option="*".join(f"parallel.{axis}" for axis, _ in _named(parallel)),
                value=size,
                rule=f"{_product(parallel)} = {size} does not divide world_size {world_size}",
                way_out=f"Nearest legal: {nearest_layouts(parallel, world_size, fits)}, "
                f"or start {_ranks(size * max(1, round(world_size / size)))}",
            )
        )
    return found


def _named(parallel: ParallelConfig) -> list[tuple[str, int]]:
    """Axes of one replica with their degrees; context only where it is used."""
    context = [("context", parallel.context)] if parallel.context != 1 else []
    return [("pp", parallel.pp), *context, ("tp", parallel.tp)]


def _product(parallel: ParallelConfig) -> str:
    return " * ".join(f"{axis}({degree})" for axis, degree in _named(parallel))


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _dp_violation(parallel: ParallelConfig, dp: int, world_size: int, fits: Fits | None) -> Violation:
    """parallel.dp was set, but the launcher's world has another size."""
    size = parallel.pp * parallel.context * parallel.tp
    given, rest = divmod(world_size, size)
    if rest:
        rule = f"world_size {world_size} is not a multiple of {_product(parallel)} = {size}"
        way_out = f"Leave parallel.dp unset and use {nearest_layouts(parallel, world_size, fits)}"
    else:
        rule = f"the launcher gave world_size {world_size} = {_product(parallel)} * dp({given})"
        way_out = f"Use parallel.dp={given}"
    return Violation(
        code=203,
        option="parallel.dp",
        value=dp,
        rule=f"dp={dp} asked, but {rule}",
        way_out=f"{way_out}, or start {_ranks(size * dp)}",
    )
