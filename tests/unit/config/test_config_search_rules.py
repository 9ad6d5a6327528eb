"""Rules for searches: option, value, rule and way out are read."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import rules_search
from engine.config.enums import LaunchTarget, SearchMethod
from engine.config.load import config_hash
from engine.config.sweep import Axis, Sweep
from engine.errors import ConfigError
from tests.helpers.configs import make

LR = Axis(option="optim.lr", low=1e-5, high=1e-2, log=True)
GRID = Axis(option="optim.lr", choices=("1", "2"))


def sweep(axis: Axis | None, changes: dict[str, Any]) -> Sweep:
    method = SearchMethod.coarse_to_fine if axis is LR and "search__method" not in changes else SearchMethod.grid
    cfg = make(**({"search__method": method} | changes))
    return Sweep(words=(), axes=(axis,) if axis else (), cfg=cfg)


CASES: list[tuple[Axis | None, dict[str, Any], str]] = [
    (
        None,
        {},
        "[OCT570] -m=(no values): no option has more than one value. Give an option several values, such as "
        'optim.lr=1e-4,3e-4, or "optim.lr=log(1e-5,1e-2)"',
    ),
    (
        LR,
        {"search__method": SearchMethod.grid},
        "[OCT572] optim.lr=1e-05 to 0.01: a grid needs a list of values, this is a range. "
        "Use optim.lr=1e-05,0.000316,0.01, or search=coarse_to_fine",
    ),
    (GRID, {"search__jobs": 0}, "[OCT573] search.jobs=0: must be at least 1. Use search.jobs=1"),
    (
        LR,
        {"search__trials": 10},
        "[OCT574] search.trials=10: search.fine_trials and search.final_seeds leave 0 coarse runs, and at least 2 are "
        "needed. Use search.trials=12 or more",
    ),
    (
        LR,
        {"search__fine_trials": -1},
        "[OCT574] search.fine_trials=-1: must be at least 0. Use search.fine_trials=0",
    ),
    (
        LR,
        {"search__prune_checks": 0},
        "[OCT574] search.prune_checks=0: must be at least 1. Use search.prune=false, or 4",
    ),
    (
        LR,
        {"search__coarse_steps": 0.0},
        "[OCT575] search.coarse_steps=0.0: is a share of train.steps above 0 and at most 1. "
        "Use search.coarse_steps=0.25",
    ),
    (
        LR,
        {"search__coarse_steps": 0.3, "search__fine_steps": 0.2},
        "[OCT575] search.fine_steps=0.2: fine runs are at least as long as coarse ones (0.3) and at most train.steps "
        "(1). Use search.fine_steps=0.6",
    ),
    (
        GRID,
        {"train__eval_batches": 0},
        "[OCT576] search.metric=val_loss: train.eval_batches=0 leaves validation out, and no run writes this metric. "
        "Use train.eval_batches=8, or search.metric=loss",
    ),
    (
        GRID,
        {"search__study": "a b"},
        "[OCT577] search.study=a b: names one folder: letters, digits, '.', '_' and '-'. Use search.study=a-b",
    ),
    (
        LR,
        {"launch__target": LaunchTarget.slurm},
        "[OCT578] launch=slurm: coarse_to_fine chooses each run by those before it, so it starts them on this machine. "
        "Use launch=local inside one job, or search=grid",
    ),
    (
        GRID,
        {"launch__target": LaunchTarget.kubernetes},
        "[OCT578] launch=kubernetes: a search starts its runs on this machine, or as an array of Slurm jobs. "
        "Use launch=local inside one pod",
    ),
]


@pytest.mark.parametrize(("axis", "changes", "message"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_a_broken_rule_says_what_to_do(axis: Axis | None, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules_search.require(sweep(axis, changes))
    assert str(caught.value) == f"1. {message}"


@pytest.mark.parametrize(("axis", "changes"), [(GRID, {}), (GRID, {"launch__target": LaunchTarget.slurm}), (LR, {})])
def test_searches_that_can_run(axis: Axis, changes: dict[str, Any]) -> None:
    assert rules_search.search_violations(sweep(axis, changes)) == []


def test_options_of_a_search_do_not_change_a_run() -> None:
    assert config_hash(make(search__jobs=4)) == config_hash(make())
