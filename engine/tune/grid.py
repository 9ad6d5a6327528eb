"""Every combination of the values."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

from engine.config.sweep import Axis, Sweep
from engine.tune import records
from engine.tune.records import OPEN, Trial

WORDS_FILE = "words.txt"


class Grid:
    """The source of a grid's runs, in the order of the values, the last option's changing fastest."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._open = [trial for trial in trials if trial.status in OPEN]

    def next(self) -> Trial | None:
        return self._open.pop(0) if self._open else None

    def hopeless(self, trial: Trial) -> bool:
        return False

    def ended(self, trial: Trial) -> None:
        if trial.status in OPEN:
            self._open.append(trial)


def combinations(root: Path, sweep: Sweep, common: Sequence[str]) -> list[Trial]:
    """All runs, as they are before the first starts. `common` are overrides that a run's own words may change."""
    steps = sweep.cfg.train.steps
    return [
        Trial(
            number=number,
            phase="grid",
            values=values,
            words=[*common, *sweep.words, *words_of(sweep.axes, values), *records.run_words(root, number)],
            steps=steps,
        )
        for number, values in enumerate(_values(sweep.axes))
    ]


def words_of(axes: Sequence[Axis], values: dict[str, str]) -> list[str]:
    """The overrides that set `values`."""
    return [axis.word(values[axis.option]) for axis in axes]


def _values(axes: Sequence[Axis]) -> list[dict[str, str]]:
    options = [axis.option for axis in axes]
    return [dict(zip(options, row, strict=True)) for row in itertools.product(*(axis.choices for axis in axes))]


def write_words(root: Path, trials: Sequence[Trial]) -> Path:
    """One line of shell-quoted overrides for each run, for an array of jobs; returns the file."""
    path = root / WORDS_FILE
    path.write_text("".join(f"{shlex.join(trial.words)}\n" for trial in trials))
    return path
