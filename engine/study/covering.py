"""Few cases out of many: a pairwise covering array, found greedily as AETG does (Cohen et al., IEEE TSE 23(7), 1997).

Every pair of values of two settings that occurs in any legal case occurs in the array; dp, which follows from others,
counts as a setting. The legal layouts are enumerated; the other settings go with each of them, so that all legal cases
are the product of the two, and the case that covers most pairs is found exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config.schema import Config
from engine.study.cases import FREE, LAYOUT, Case, Domains, is_legal

_Values = tuple[Any, ...]


class Space:
    """All legal cases over `domains`, which name every setting; those of few ranks first."""

    def __init__(self, base: Config, domains: Domains) -> None:
        self._names = (*LAYOUT, *FREE)
        self.layouts = list(_legal_layouts(base, domains))
        self.extras: list[_Values] = list(product(*(domains[name] for name in FREE)))

    def __len__(self) -> int:
        return len(self.layouts) * len(self.extras)

    def case(self, number: int) -> Case:
        """Case `number` of all."""
        layout, extra = divmod(number, len(self.extras))
        return Case(**dict(zip(self._names, (*self.layouts[layout], *self.extras[extra]), strict=True)))


def choose(space: Space, count: int) -> list[Case]:
    """`count` cases, or all there are: first those that cover most pairs, then pseudo-random ones.

    The second kind takes world sizes and flavours in turn. Deterministic; the choice for a smaller count is the
    beginning of that for a larger one.
    """
    numbers: dict[int, None] = {}
    for source in (_cover(space), _others(space)):
        for number in source:
            if len(numbers) == count:
                break
            numbers[number] = None
    return [space.case(number) for number in numbers]


def covering_size(space: Space) -> int:
    """Cases that cover every pair."""
    return sum(1 for _ in _cover(space))


def _legal_layouts(base: Config, domains: Domains) -> Iterator[_Values]:
    """A layout is legal if it is with one choice of the free settings."""
    extra = {name: domains[name][0] for name in FREE}
    for values in product(*(domains[name] for name in LAYOUT)):
        if is_legal(base, Case(**dict(zip(LAYOUT, values, strict=True)), **extra)):
            yield values


def _cover(space: Space) -> Iterator[int]:
    """Numbers of cases, each of which covers as many pairs as any can that are not yet covered; ends when all are."""
    if not len(space):
        return
    layouts, extras = _items(space)
    missing = np.zeros((int(extras.max()) + 1,) * 2, dtype=bool)
    for table in (layouts, extras):
        for one, other in product(range(table.shape[1]), repeat=2):
            if one != other:
                missing[table[:, one], table[:, other]] = True
    for layout_item, extra_item in product(np.unique(layouts), np.unique(extras)):
        missing[layout_item, extra_item] = missing[extra_item, layout_item] = True
    while missing.any():
        # Pairs inside a layout, inside its extras, and between the two; a pair counts twice in the first two.
        inside = [missing[table[:, :, None], table[:, None, :]].sum(axis=(1, 2)) // 2 for table in (layouts, extras)]
        between = missing[layouts].sum(axis=1)[:, extras].sum(axis=2)
        best = int(np.argmax(inside[0][:, None] + inside[1][None, :] + between))
        layout, extra = divmod(best, len(space.extras))
        chosen = [*layouts[layout], *extras[extra]]
        missing[np.ix_(chosen, chosen)] = False
        yield best


def _items(space: Space) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Layouts (with dp) and extras with each value as a number that no other value of any setting has."""
    dp = [space.case(index * len(space.extras)).dp for index in range(len(space.layouts))]
    tables, first = [], 0
    for rows in ([(*layout, d) for layout, d in zip(space.layouts, dp, strict=True)], space.extras):
        columns = []
        for values in zip(*rows, strict=True):
            number = {value: first + index for index, value in enumerate(dict.fromkeys(values))}
            first += len(number)
            columns.append([number[value] for value in values])
        tables.append(np.array(columns).T)
    return tables[0], tables[1]


def _others(space: Space) -> Iterator[int]:
    """All case numbers in a pseudo-random order, world sizes and flavours in turn."""
    width = len(space.extras)
    order = np.random.default_rng(0).permutation(len(space))
    world, flavour = list(LAYOUT).index("world"), list(LAYOUT).index("flavour")
    kinds = [(layout[world], layout[flavour]) for layout in space.layouts]
    known = sorted(set(kinds))
    kind_of = np.array([known.index(kind) for kind in kinds])[order // width] if kinds else order
    queues = [iter(order[kind_of == index].tolist()) for index in range(len(known))]
    waiting = set(range(len(queues)))
    for index in cycle(range(len(queues))):
        number = next(queues[index], None)
        if number is None:
            waiting.discard(index)
            if not waiting:
                return
        else:
            yield number
