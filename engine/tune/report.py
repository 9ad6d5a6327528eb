"""`python -m engine.tune report SEARCH_FOLDER`: what a search found, as a table, pictures, a page and an experiment."""

from __future__ import annotations

import argparse
import html
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from engine.config.sweep import differences
from engine.errors import LaunchError
from engine.observe.log import say
from engine.tune import pictures, records, slurm_array
from engine.tune.records import Status, Trial

BEST_FILE = "best.yaml"
PAGE_FILE = "report.html"
FILES = (BEST_FILE, PAGE_FILE, *pictures.FILES)
PHASES = ("final", "fine", "coarse", "grid")
"""Which runs' results count most: the longest ones'."""
STYLE = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:left}"


def main(argv: Sequence[str]) -> int:
    """Write the report into the search's folder and print the table; 0.

    Raises:
        LaunchError: 583 no search there, 584 no run of it has ended well.
    """
    parser = argparse.ArgumentParser(prog="python -m engine.tune report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="SEARCH_FOLDER")
    root: Path = parser.parse_args(argv).folder
    search = records.definition(root)["search"]
    trials = records.read(root)
    slurm_array.settle(root, trials, search["metric"])
    for trial in trials:
        records.settle(root, trial, search["metric"])
    direction = search["direction"]
    say(table(trials, direction))
    shares = importance(trials, direction)
    for option, share in shares.items():
        say(f"importance of {option}: {share:.0%}")
    best = best_trial(trials, direction)
    (root / BEST_FILE).write_text(best_yaml(best, root, search["metric"]))
    drawn = pictures.draw(root, trials, search["metric"], direction)
    (root / PAGE_FILE).write_text(page(root, trials, direction, shares, drawn))
    say(f"best: run {best.number}, {best}")
    final = [trial.value for trial in trials if trial.phase == "final" and trial.value is not None]
    if len(final) > 1:
        say(f"{len(final)} whole runs of these values: {mean(final):.4f}, standard deviation {stdev(final):.4f}")
    say(f"page in {root / PAGE_FILE}; to train with the best values:")
    say(f"python -m engine.train {shlex.quote(f'experiment={root / BEST_FILE}')} run.name=NAME")
    return 0


def ordered(trials: Sequence[Trial], direction: str) -> list[Trial]:
    """Longer phases first, in them best first, and those without a result last."""
    sign = -1.0 if direction == "maximize" else 1.0

    def key(trial: Trial) -> tuple[int, bool, float]:
        done = trial.status is Status.done and trial.value is not None
        return PHASES.index(trial.phase), not done, sign * (trial.value or 0.0) if done else trial.number

    return sorted(trials, key=key)


def best_trial(trials: Sequence[Trial], direction: str) -> Trial:
    """The best run of the longest phase that has results. Raises LaunchError 584: there is none."""
    for trial in ordered(trials, direction):
        if trial.status is Status.done:
            return trial
    rule = f"none of its {len(trials)} runs has ended well"
    way_out = "See the column status, and the output in trials/<run>.log"
    raise LaunchError.of(584, "SEARCH_FOLDER", "(no result)", rule, way_out)


HEAD = ("run", "phase", "status", "result", "steps", "s", "values")


def rows(trials: Sequence[Trial], direction: str) -> list[tuple[str, ...]]:
    """The table, a line for each run in the order of `ordered`."""
    return [
        (
            str(trial.number),
            trial.phase,
            trial.status.name,
            "-" if trial.value is None else f"{trial.value:.4f}",
            f"{trial.steps_done}/{trial.steps}",
            f"{trial.seconds:.0f}",
            str(trial),
        )
        for trial in ordered(trials, direction)
    ]


def table(trials: Sequence[Trial], direction: str) -> str:
    """`rows` as text."""
    lines = [HEAD, *rows(trials, direction)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def importance(trials: Sequence[Trial], direction: str) -> dict[str, float]:
    """Each option's share in what decides whether a run is among the best, most first; they add up to 1.

    PED-ANOVA (arXiv 2304.10255) over the runs of the phase with most results: lengths differ between phases. Empty when
    Optuna is not installed, and for fewer than four results or results that are all the same.
    """
    try:
        import optuna
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    except ModuleNotFoundError:
        return {}
    done = [trial for trial in trials if trial.status is Status.done]
    runs = max(([trial for trial in done if trial.phase == phase] for phase in PHASES), key=len)
    varied = [option for option in (runs[0].values if runs else ()) if len({run.values[option] for run in runs}) > 1]
    if len(runs) < 4 or not varied or len({run.value for run in runs}) == 1:
        return {}
    scales = {option: pictures.scale([run.values[option] for run in runs]) for option in varied}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=optuna.study.StudyDirection[direction.upper()])
    for run in runs:
        chosen: dict[str, str | float] = {}
        space: dict[str, optuna.distributions.BaseDistribution] = {}
        for option, (numbers, log) in scales.items():
            text = run.values[option]
            if numbers is None:
                chosen[option] = text
                space[option] = optuna.distributions.CategoricalDistribution(
                    sorted({other.values[option] for other in runs})
                )
            else:
                chosen[option] = float(text)
                space[option] = optuna.distributions.FloatDistribution(min(numbers), max(numbers), log=log)
        study.add_trial(optuna.trial.create_trial(params=chosen, distributions=space, value=run.value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def best_yaml(best: Trial, root: Path, metric: str) -> str:
    """A whole run with the best values as a file for conf/experiment: all options that differ from the defaults."""
    words = [*records.definition(root)["words"], *(f"{option}={value}" for option, value in best.values.items())]
    head = f"# @package _global_\n# {root.name}, run {best.number} ({best.phase}): {metric} {best.value}\n# {best}\n"
    return head + differences(words)


def page(root: Path, trials: Sequence[Trial], direction: str, shares: dict[str, float], drawn: Sequence[str]) -> str:
    """The report as HTML, with the pictures beside it."""

    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = [f"<h1>{html.escape(root.name)}</h1>", *(f'<p><img src="{name}" width="900"></p>' for name in drawn)]
    if shares:
        body += ["<h2>Importance</h2><table>", *(line((name, f"{share:.0%}"), "td") for name, share in shares.items())]
        body.append("</table>")
    body += [
        "<h2>Runs</h2><table>",
        line(HEAD, "th"),
        *(line(row, "td") for row in rows(trials, direction)),
        "</table>",
    ]
    for trial in trials:
        if trial.last_lines and trial.status not in (Status.done, Status.pruned):
            text = html.escape("\n".join(trial.last_lines))
            body.append(f"<h3>run {trial.number}: {trial.status}, exit code {trial.exit_code}</h3><pre>{text}</pre>")
    title = html.escape(root.name)
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n" + "\n".join(body) + "\n"
