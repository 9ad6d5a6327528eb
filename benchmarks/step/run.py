"""Octant next to peers: the same case in each of them, in turn, on the same GPUs, in one call.

python -m benchmarks.step.run OUT_FOLDER --commit HASH --case NAME[,NAME] [--systems NAME,NAME] [--rounds 2]
    [--budget-s N] [--warmup N] [--measured N] [--quick] [overrides of engine.train]
python -m benchmarks.step.run --list

Cases are in `cases`, systems in `systems`. Each system is a process of its own, the second round in the opposite order,
so that clocks and heat fall on all alike; a system that cannot run has a row with the reason. The last two steps of the
first round are profiled and not timed. Rows are added to `rows.jsonl` after every round: `report` takes the newer ones.
A loss in fp32 of the same data and weights comes last, where it fits the budget; `--systems 'fp32 reference'` makes it
alone, for rows of another call at the same commit. `--quick` makes tiny shapes, on a CPU too, with gloo between ranks:
that shows that all runs, and measures nothing.

`--systems octant_one_rank` runs the first rank of a case with several alone on one GPU (`engine.study rank`). That is
not the case: it shows how fast the rank would be if it never waited.

A step is timed from when the loss of the step before has been read to when its own has, which waits for the device.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.kernels.sheet import Sheet
from benchmarks.step.cases import CASES, Case
from benchmarks.step.contest import Budget, Contest
from benchmarks.step.systems import ONE_RANK, REFERENCE, SYSTEMS
from benchmarks.step.words import quick, words_of

BUDGET_S = 580.0
"""Seconds of a call by default."""
_SET_HERE = ("train.steps=", "train.global_batch=", "parallel.dp=", "profile.", "run.")


def _of(known: Collection[str], what: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {what} '{name}' (known: {', '.join(known)})")
        return names

    return parse


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; rows are added to rows.jsonl in a folder")
    return path.resolve()


def options_of(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, checked, and the overrides in it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.run")
    parser.add_argument("out", type=_folder, help="folder; rows are added to its rows.jsonl")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--case", type=_of(CASES, "case"), required=True, help="names of --list")
    known = _of((*SYSTEMS, REFERENCE), "system")
    all_ranks = [name for name in SYSTEMS if name != ONE_RANK]
    parser.add_argument("--systems", type=known, default=all_ranks, help=f"default: all but {ONE_RANK}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_S, help=f"seconds of the call, {BUDGET_S:g} by default"
    )
    parser.add_argument("--warmup", type=int, help="steps of a process that are not counted")
    parser.add_argument("--measured", type=int, help="counted steps of a process")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU too: functional only")
    options, overrides = parser.parse_known_args(argv)
    for name, least in (("rounds", 1), ("budget_s", 1e-9), ("warmup", 0), ("measured", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value:g}: must be {'positive' if least else 'at least 0'}")
    if set_here := [word for word in overrides if word.startswith(_SET_HERE)]:
        parser.error(f"{set_here[0]}: the suite sets it (steps: --warmup and --measured)")
    if not options.quick and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; on a CPU only --quick runs")
    return options, overrides


def _line(case: Case) -> str:
    goals = "; ".join(target.text for target in case.targets) or "for comparison"
    return f"{case.name}: {case.gpus} GPU{'s' if case.gpus > 1 else ''}: {goals}"


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for, with its numbers of steps."""
    found = [quick(CASES[name]) if options.quick else CASES[name] for name in options.case]
    steps = {name: getattr(options, name) for name in ("warmup", "measured") if getattr(options, name) is not None}
    return [replace(case, **steps) for case in found]


def main(argv: list[str]) -> None:
    """Run the cases one after the other."""
    if argv == ["--list"]:
        print("\n".join(map(_line, CASES.values())))
        return
    options, overrides = options_of(argv)
    cases = cases_of(options)
    try:
        planned = [(case, words_of(case, overrides)) for case in cases]
    except ValueError as error:
        raise SystemExit(f"python -m benchmarks.step.run: {error}") from error
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    here = [word for word in argv if Path(word).resolve() != options.out]
    command = f"python -m benchmarks.step.run OUT_FOLDER {shlex.join(here)}"
    sheet = Sheet(options.out / "rows.jsonl", options.commit, command, device, options.quick)
    budget, call = Budget(options.budget_s), datetime.now(UTC).isoformat(timespec="seconds")
    for case, words in planned:
        Contest(case, words, sheet, budget, call).run(options.systems, options.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
