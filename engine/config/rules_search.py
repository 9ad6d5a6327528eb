"""Rules for a search (codes 570, 572..578): enough runs, of sensible lengths, with a metric that they write."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from engine.config.enums import LaunchTarget, SearchMethod
from engine.config.schema import Config
from engine.config.sweep import Sweep
from engine.errors import ConfigError, Violation


def coarse_trials(cfg: Config) -> int:
    """Runs of the first phase of coarse_to_fine."""
    return cfg.search.trials - cfg.search.fine_trials - cfg.search.final_seeds


def require(sweep: Sweep) -> None:
    """Raise `ConfigError` with every violation of `search_violations`, if there is any."""
    found = search_violations(sweep)
    if found:
        raise ConfigError(found)


def search_violations(sweep: Sweep) -> list[Violation]:
    """Every broken rule of a search."""
    cfg = sweep.cfg
    found = [*_shared(sweep)]
    if cfg.search.method is SearchMethod.grid:
        found += _grid(sweep)
    else:
        found += [*_phases(cfg), *_target(cfg)]
    return found


def _violation(code: int, option: str, value: object, rule: str, way_out: str) -> Violation:
    return Violation(code=code, option=option, value=value, rule=rule, way_out=way_out)


def _shared(sweep: Sweep) -> Iterator[Violation]:
    """Something to go through (570), a job (573), a metric that is written (576), a folder's name (577)."""
    cfg, search = sweep.cfg, sweep.cfg.search
    if not sweep.axes:
        way_out = 'Give an option several values, such as optim.lr=1e-4,3e-4, or "optim.lr=log(1e-5,1e-2)"'
        yield _violation(570, "-m", "(no values)", "no option has more than one value", way_out)
    if search.jobs < 1:
        yield _violation(573, "search.jobs", search.jobs, "must be at least 1", "Use search.jobs=1")
    if search.metric == "val_loss" and cfg.train.eval_batches == 0:
        rule = "train.eval_batches=0 leaves validation out, and no run writes this metric"
        yield _violation(576, "search.metric", search.metric, rule, "Use train.eval_batches=8, or search.metric=loss")
    if cfg.launch.target is LaunchTarget.kubernetes:
        rule = "a search starts its runs on this machine, or as an array of Slurm jobs"
        yield _violation(578, "launch", cfg.launch.target, rule, "Use launch=local inside one pod")
    if search.study is not None and (not re.fullmatch(r"[A-Za-z0-9._-]+", search.study) or set(search.study) == {"."}):
        clean = re.sub(r"[^A-Za-z0-9._-]+", "-", search.study).strip("-.") or "search"
        rule = "names one folder: letters, digits, '.', '_' and '-'"
        yield _violation(577, "search.study", search.study, rule, f"Use search.study={clean}")


def _grid(sweep: Sweep) -> Iterator[Violation]:
    """A grid has a list of values for each option (572)."""
    for axis in sweep.axes:
        if not axis.choices:
            rule = "a grid needs a list of values, this is a range"
            middle = math.sqrt(axis.low * axis.high) if axis.log else (axis.low + axis.high) / 2
            values = f"{axis.low:g},{middle:.3g},{axis.high:g}"
            way_out = f"Use {axis.option}={values}, or search=coarse_to_fine"
            yield _violation(572, axis.option, f"{axis.low:g} to {axis.high:g}", rule, way_out)


def _phases(cfg: Config) -> Iterator[Violation]:
    """Runs for each phase (574) and growing lengths (575)."""
    search, coarse = cfg.search, coarse_trials(cfg)
    for option, value in (("fine_trials", search.fine_trials), ("final_seeds", search.final_seeds)):
        if value < 0:
            yield _violation(574, f"search.{option}", value, "must be at least 0", f"Use search.{option}=0")
    if coarse < 2:
        rule = f"search.fine_trials and search.final_seeds leave {coarse} coarse runs, and at least 2 are needed"
        way_out = f"Use search.trials={search.trials - coarse + 2} or more"
        yield _violation(574, "search.trials", search.trials, rule, way_out)
    if search.prune_checks < 1:
        rule = "must be at least 1"
        yield _violation(574, "search.prune_checks", search.prune_checks, rule, "Use search.prune=false, or 4")
    if not 0 < search.coarse_steps <= 1:
        rule = "is a share of train.steps above 0 and at most 1"
        yield _violation(575, "search.coarse_steps", search.coarse_steps, rule, "Use search.coarse_steps=0.25")
    elif not search.coarse_steps <= search.fine_steps <= 1:
        rule = f"fine runs are at least as long as coarse ones ({search.coarse_steps:g}) and at most train.steps (1)"
        way_out = f"Use search.fine_steps={min(1.0, 2 * search.coarse_steps):g}"
        yield _violation(575, "search.fine_steps", search.fine_steps, rule, way_out)


def _target(cfg: Config) -> Iterator[Violation]:
    """A search that looks at its runs starts them itself (578)."""
    if cfg.launch.target is LaunchTarget.slurm:
        rule = "coarse_to_fine chooses each run by those before it, so it starts them on this machine"
        yield _violation(578, "launch", cfg.launch.target, rule, "Use launch=local inside one job, or search=grid")
