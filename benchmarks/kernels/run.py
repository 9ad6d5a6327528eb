"""Kernels of Octant next to those of others: times, rates, memory and errors, on one device, in one process.

python -m benchmarks.kernels.run OUT_FOLDER --commit HASH [--suite attention,loss] [--quick] [--budget-s N]
    [--tutorial FILE] [--without NAME,NAME]

All systems of a case are sampled in turn (`timing`), after their results were held against fp32. Rows are added to
`rows.jsonl` in OUT_FOLDER after every case, so that what was measured before stays; where a case occurs again,
`report` and `table` take the newer rows. A system that cannot run a case has a row that says why. A suite ends when
its seconds are over, most important cases first. `--quick` makes tiny shapes, on a CPU too, where Triton interprets:
that shows that all runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

SUITES = {"attention": 200.0, "documents": 60.0, "loss": 60.0, "elementwise": 90.0, "optimizer": 45.0}
"""Their seconds by default, in the order in which they run."""


def _suites(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SUITES:
            raise argparse.ArgumentTypeError(f"unknown suite '{name}' (known: {', '.join(SUITES)})")
    return names


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; rows are added to rows.jsonl in a folder")
    return path


def options_of(argv: list[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.run")
    parser.add_argument("out", type=_folder, help="folder; rows are added to its rows.jsonl")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--suite", type=_suites, default=list(SUITES), help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, on a CPU too: functional only")
    parser.add_argument("--budget-s", type=float, help=f"seconds of each suite; default: {SUITES}")
    parser.add_argument("--tutorial", help="Triton's tutorial 06-fused-attention.py")
    parser.add_argument("--without", default="", help="systems that are left out, comma-separated")
    options = parser.parse_args(argv)
    if options.budget_s is not None and options.budget_s <= 0:
        parser.error(f"--budget-s {options.budget_s:g}: must be positive")
    if not options.quick and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; on a CPU only --quick runs")
    return options


def _words(options: argparse.Namespace) -> list[str]:
    """The command line once more, without folders of this machine."""
    words = ["--commit", options.commit, "--suite", ",".join(options.suite), *(["--quick"] if options.quick else [])]
    for name in ("budget_s", "tutorial", "without"):
        if value := getattr(options, name):
            text = f"{value:g}" if name == "budget_s" else Path(value).name
            words += [f"--{name.replace('_', '-')}", text]
    return words


def main(argv: list[str]) -> None:
    """Run the suites one after the other."""
    options = options_of(argv)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        # Triton reads it when a kernel is defined, which the imports below do.
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.kernels import attention, documents, elementwise, loss, optimizer
    from benchmarks.kernels.contest import Bench, clean
    from benchmarks.kernels.sheet import Sheet
    from benchmarks.kernels.timing import Budget, Timer, reason

    _prepare_compiler()
    sheet = Sheet.open(options.out, options.commit, _words(options), device, quick=options.quick)
    timer = Timer(device, least=2, most=2) if options.quick else Timer(device)
    without = frozenset(options.without.split(",")) - {""}
    runs = {"documents": documents.run, "loss": loss.run, "elementwise": elementwise.run, "optimizer": optimizer.run}
    runs["attention"] = partial(attention.run, tutorial=options.tutorial)
    failed = []
    for name in options.suite:
        start, seconds = time.perf_counter(), options.budget_s or SUITES[name]
        try:
            runs[name](Bench(sheet, timer, Budget(seconds), without))
            clean(device)
        except Exception as error:
            # A kernel that wrote where it must not spoils the device for all that come after it.
            sheet.unavailable(name, "all", reason(error), suite=name)
            failed.append(name)
        print(f"{name}: {time.perf_counter() - start:.0f} s of {seconds:.0f}", flush=True)
    if failed:
        raise SystemExit(f"ended early: {', '.join(failed)}")


def _prepare_compiler() -> None:
    """Graphs are kept for several backward passes, and one function is compiled for more shapes than usual."""
    import torch._dynamo.config
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 256


if __name__ == "__main__":
    main(sys.argv[1:])
