"""The covering array is complete, which is shown without the code that makes it."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from engine.config import Config, rules
from engine.study.cases import FREE, GLOBAL_BATCH, LAYOUT, Case, configure, model_key
from engine.study.covering import Space, choose, covering_size
from tests.unit.study.test_study_cases import base

Pair = tuple[tuple[str, Any], tuple[str, Any]]
FIELDS = (*LAYOUT, *FREE, "dp")
DOMAINS = {
    **LAYOUT,
    **FREE,
    "world": (1, 4),
    "tp": (1, 2),
    "context": (1, 2),
    "pp": (1, 2),
    "accum": (1, 4),
    "zero": (0, 2, 3),
}


@pytest.fixture(scope="module")
def space() -> Space:
    return Space(base(), DOMAINS)


def pairs(case: Case) -> set[Pair]:
    return set(combinations([(name, getattr(case, name)) for name in FIELDS], 2))


def legal(cfg: Config, case: Case) -> bool:
    fits = case.world % (case.pp * case.context * case.tp) == 0 and GLOBAL_BATCH % (case.dp * case.accum) == 0
    fits = fits and not (case.packed and case.flavour == "bert")
    return fits and (case.tp > 1 or not case.sequence) and rules.check(configure(cfg, case), case.world) == []


def test_every_pair_of_any_legal_case_occurs(space: Space) -> None:
    cfg = base()
    covered: set[Pair] = set().union(*(pairs(case) for case in choose(space, covering_size(space))))
    first = {name: DOMAINS[name][0] for name in DOMAINS}
    values_of_free = [(name, value) for name in FREE for value in DOMAINS[name]]
    seen = 0
    for values in product(*(DOMAINS[name] for name in LAYOUT)):
        layout = first | dict(zip(LAYOUT, values, strict=True))
        if not legal(cfg, Case(**layout)):
            continue
        seen += 1
        # Another free setting for each layout, so that all of them meet the rules; their pairs must be there too.
        for name, value in values_of_free:
            case = Case(**layout | {name: value})
            assert pairs(case) <= covered, sorted(map(str, pairs(case) - covered))
    assert seen == len(space.layouts)
    for one, other in combinations(FREE, 2):
        for a, b in product(DOMAINS[one], DOMAINS[other]):
            assert legal(cfg, Case(**first | {one: a, other: b}))
            assert ((one, a), (other, b)) in covered


def test_a_choice_is_legal_distinct_and_begins_every_longer_one(space: Space) -> None:
    many = choose(space, 120)
    assert len(set(many)) == 120
    assert choose(space, 20) == many[:20]
    assert all(legal(base(), case) for case in many)
    flavours = [case.flavour for case in many]
    assert all(flavours.count(flavour) >= 18 for flavour in LAYOUT["flavour"])


def test_few_cases_cover_more_than_as_many_taken_at_random(space: Space) -> None:
    need = covering_size(space)
    many = choose(space, need + 20)
    chosen, others = (len(set().union(*map(pairs, part))) for part in (many[:20], many[need:]))
    assert chosen > others


def test_asking_for_more_than_there_are_gives_all() -> None:
    one = {name: values[:1] for name, values in {**LAYOUT, **FREE}.items()}
    small = Space(base(), {**one, "world": (1, 2), "tied": (True, False), "sequence": (False,)})
    assert len(small) == 4
    assert len(set(choose(small, 100))) == 4


def test_nothing_legal_gives_nothing() -> None:
    empty = Space(base(), {**LAYOUT, **FREE, "world": (3,), "pp": (2,)})
    assert (len(empty), choose(empty, 5), covering_size(empty)) == (0, [], 0)


def test_cases_of_one_key_have_one_model(space: Space) -> None:
    models: dict[str, set[str]] = {}
    for case in choose(space, 120):
        models.setdefault(model_key(base(), case), set()).add(str(configure(base(), case).model))
    assert all(len(found) == 1 for found in models.values())
    assert len(models) > 20
