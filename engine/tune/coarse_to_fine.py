"""Short runs over the whole space, longer ones around the best of them, whole ones of the best with several seeds.

Optuna's TPE sampler (Bergstra et al., 2011) proposes values, its median pruner (Golovin et al., 2017) ends runs, and an
SQLite file keeps both phases' studies. What counts as a run is what `records` holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from engine.config.rules_search import coarse_trials
from engine.config.sweep import Axis, Sweep
from engine.tune import records
from engine.tune.grid import words_of
from engine.tune.records import OPEN, Status, Trial

NARROW = 0.25
"""Part of each range, around the best value, that the fine runs search."""
KEPT = 3
"""Best coarse runs whose choices the fine runs may take."""
WARM_TRIALS = 4
"""Runs of a phase that are never pruned, and random draws before the sampler has enough to model."""
UNSEEN = ["checkpoint.save_final=false", "logging.progress=false", "logging.plot=false"]
"""Overrides of runs that only their metric is wanted of; the user's come after them."""


class CoarseToFine:
    """The source of the runs of the three phases."""

    def __init__(self, root: Path, sweep: Sweep, trials: Sequence[Trial], common: Sequence[str]) -> None:
        self._root, self._sweep, self._trials, self._common = root, sweep, list(trials), list(common)
        self._search = sweep.cfg.search
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = optuna.storages.RDBStorage(f"sqlite:///{(root / records.DATABASE).absolute()}")
        pruner = optuna.pruners.MedianPruner(n_startup_trials=WARM_TRIALS)
        direction = optuna.study.StudyDirection[self._search.direction.upper()]
        self._studies = {
            phase: optuna.create_study(
                storage=storage, study_name=phase, direction=direction, pruner=pruner, load_if_exists=True
            )
            for phase in ("coarse", "fine")
        }
        self._open = [trial for trial in trials if trial.status in OPEN]
        self._asked: dict[int, optuna.Trial] = {}
        self._seen: dict[int, set[int]] = {}
        self._reconcile()

    def next(self) -> Trial | None:
        if self._open:
            return self._open.pop(0)
        wanted = {
            "coarse": coarse_trials(self._sweep.cfg),
            "fine": self._search.fine_trials,
            "final": self._search.final_seeds,
        }
        for phase, count in wanted.items():
            begun = [trial for trial in self._trials if trial.phase == phase]
            if len(begun) < count:
                return self._final() if phase == "final" else self._ask(phase)
            # A phase looks at all results of the one before.
            if any(trial.status in OPEN for trial in begun):
                return None
        return None

    def hopeless(self, trial: Trial) -> bool:
        if trial.phase == "final" or not self._search.prune:
            return False
        asked, seen = self._asked[trial.number], self._seen.setdefault(trial.number, set())
        for step, value in records.metric_points(self._root / str(trial.number), self._search.metric):
            if step < trial.steps and step not in seen:
                seen.add(step)
                asked.report(value, step)
                if asked.should_prune():
                    return True
        return False

    def ended(self, trial: Trial) -> None:
        if trial.status in OPEN:
            self._open.append(trial)
        elif trial.phase != "final":
            self._tell(trial)

    def best(self, phases: Sequence[str]) -> list[Trial]:
        """Runs of these phases that have ended well, best first."""
        found = [trial for trial in self._trials if trial.phase in phases and trial.status is Status.done]
        return ranked(found, str(self._search.direction))

    def _ask(self, phase: str) -> Trial | None:
        """A new run of the coarse or fine phase; None when there is nothing to be fine about."""
        study, number, axes = self._studies[phase], len(self._trials), list(self._sweep.axes)
        if phase == "fine":
            best = self.best(["coarse"])
            if not best:
                return None
            axes = [narrowed(axis, best) for axis in axes]
            first = not any(trial.phase == "fine" for trial in self._trials)
            if first and not study.get_trials(states=(TrialState.WAITING,)):
                study.enqueue_trial({axis.option: _number(axis, best[0].values[axis.option]) for axis in axes})
        # Seeded by the run's number, so that a search that was ended draws what it would have drawn.
        seed = self._search.seed * 100_003 + number
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=WARM_TRIALS, constant_liar=True)
        asked = study.ask({axis.option: distribution(axis) for axis in axes})
        values = {axis.option: str(asked.params[axis.option]) for axis in axes}
        share = self._search.coarse_steps if phase == "coarse" else self._search.fine_steps
        words, steps = short_words(self._sweep, share)
        asked.set_user_attr("run", number)
        trial = self._add(phase, values, steps, [*UNSEEN, *self._common, *self._sweep.words, *words])
        self._asked[number] = asked
        return trial

    def _final(self) -> Trial | None:
        """A whole run of the best values with the next seed; None when no run has ended well."""
        best = self.best(["fine"]) or self.best(["coarse"])
        if not best:
            return None
        seed = self._sweep.cfg.train.seed + sum(trial.phase == "final" for trial in self._trials)
        words = [*self._common, *self._sweep.words, f"train.seed={seed}"]
        return self._add("final", dict(best[0].values), self._sweep.cfg.train.steps, words)

    def _add(self, phase: str, values: dict[str, str], steps: int, words: list[str]) -> Trial:
        number = len(self._trials)
        words = [*words, *words_of(self._sweep.axes, values), *records.run_words(self._root, number)]
        trial = Trial(number=number, phase=phase, values=values, words=words, steps=steps)
        records.write(self._root, trial)
        self._trials.append(trial)
        return trial

    def _tell(self, trial: Trial) -> None:
        study, asked = self._studies[trial.phase], self._asked[trial.number]
        if trial.status is Status.done:
            study.tell(asked, trial.value)
        elif trial.status is Status.pruned:
            study.tell(asked, state=TrialState.PRUNED)
        else:
            study.tell(asked, state=TrialState.FAIL)

    def _reconcile(self) -> None:
        """Bring the studies up to the records after a search was killed between two writes."""
        for phase, study in self._studies.items():
            of_phase = [trial for trial in self._trials if trial.phase == phase]
            for frozen in study.get_trials(states=(TrialState.RUNNING,)):
                known = [trial for trial in of_phase if _same(trial, frozen)]
                asked = optuna.Trial(study, frozen._trial_id)
                if not known or known[0].number in self._asked:
                    # Proposed, and never put on record: proposed again with the same seed.
                    study.tell(asked, state=TrialState.FAIL)
                    continue
                self._asked[known[0].number] = asked
                self._seen[known[0].number] = set(frozen.intermediate_values)
                if known[0].status not in OPEN:
                    self._tell(known[0])


def _same(trial: Trial, frozen: optuna.trial.FrozenTrial) -> bool:
    run = frozen.user_attrs.get("run")
    if run is not None:
        return bool(run == trial.number)
    return trial.values == {option: str(value) for option, value in frozen.params.items()}


def ranked(trials: Sequence[Trial], direction: str) -> list[Trial]:
    """Best first. All have a value."""
    sign = 1.0 if direction == "minimize" else -1.0
    return sorted(trials, key=lambda trial: sign * (math.inf if trial.value is None else trial.value))


def short_words(sweep: Sweep, share: float) -> tuple[list[str], int]:
    """The overrides of a run of `share` of train.steps, and its steps."""
    steps = max(1, round(sweep.cfg.train.steps * share))
    words = [f"train.steps={steps}"]
    if sweep.cfg.search.prune:
        words.append(f"train.eval_every={max(1, steps // sweep.cfg.search.prune_checks)}")
    return words, steps


def distribution(axis: Axis) -> BaseDistribution:
    """The values of an axis in Optuna's terms."""
    if axis.choices:
        return CategoricalDistribution(axis.choices)
    if axis.integer:
        return IntDistribution(math.ceil(axis.low), math.floor(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def narrowed(axis: Axis, best: Sequence[Trial]) -> Axis:
    """The part of an axis around the best run: `NARROW` of its range, or the choices of the `KEPT` best."""
    if axis.choices:
        kept = {trial.values[axis.option] for trial in best[:KEPT]}
        return Axis(option=axis.option, choices=tuple(choice for choice in axis.choices if choice in kept))
    centre = float(best[0].values[axis.option])
    if axis.log:
        reach = (axis.high / axis.low) ** (NARROW / 2)
        low, high = centre / reach, centre * reach
    else:
        reach = (axis.high - axis.low) * NARROW / 2
        low, high = centre - reach, centre + reach
    low, high = max(axis.low, low), min(axis.high, high)
    if axis.integer:
        low, high = math.floor(low), math.ceil(high)
    return Axis(option=axis.option, low=low, high=high, log=axis.log, integer=axis.integer)


def _number(axis: Axis, value: str) -> str | float | int:
    if axis.choices:
        return value
    return int(value) if axis.integer else float(value)
