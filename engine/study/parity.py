"""`python -m engine.study parity`: does every layout compute what one process computes?

For each case the raw gradients of every parameter, five SGD steps with clipping, the losses and the clip norms are
compared with `runtime.reference` in fp32. Raw gradients and SGD, because Adam hides a wrong scale.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from engine.config.load import load
from engine.config.schema import Config
from engine.data import prepare
from engine.dist.context import ParallelContext
from engine.dist.init import resolve_device_type, set_numerics
from engine.dist.spawn import RankFailure, run_ranks
from engine.errors import ConfigError, LaunchError
from engine.observe.environment import environment
from engine.observe.log import quiet_libraries, say
from engine.observe.progress import human_time
from engine.study.cases import FLAVOURS, Case, configure, covering_subset, enumerate_cases, refusal
from engine.study.measure import Comparison, Measured, compare, measure_ranks, measure_reference
from engine.topology.grid import Grid

GRADIENT, LOSS, NORM, PARAMETERS = 1e-5, 1e-6, 1e-6, 1e-4
PRELOAD = ["engine.train.session", "engine.runtime.pipeline", "engine.runtime.zero"]
DEFAULTS = ["data=random", "data.seq_len=16", "train.steps=5", "optim.warmup_steps=0", "run.name=parity"]
"""Overrides that come before the user's: small random samples, which reach every entry of the vocabulary."""


def main(argv: Sequence[str]) -> int:
    """Run the study; 0 when every case agrees, 1 on any miss."""
    options, overrides = _parse(argv)
    base = load([*DEFAULTS, *overrides])
    worlds = _possible(options.worlds, resolve_device_type(base.train.device))
    cases = list(
        enumerate_cases(
            base,
            worlds=worlds,
            pp=options.pp,
            tp=options.tp,
            zero=options.zero,
            accum=options.accum,
            flavours=options.flavours,
            tied=[word == "tied" for word in options.tied],
        )
    )
    if options.quick:
        cases = covering_subset(cases)
    if not cases:
        smallest = Case(1, 1, 1, 0, 1, options.flavours[0], options.tied[0] == "tied")
        found = refusal(base, smallest)
        if found:
            raise ConfigError(found)
        raise LaunchError.of(
            521, "parity", " ".join(argv), "no combination of the asked values is legal", "Widen --worlds, --pp or --tp"
        )
    quiet_libraries(base.logging.verbose)
    prepare(base.data, say)
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"environment": environment(), "limits": limits()}
    rows: list[dict[str, Any]] = []
    for rows in run_cases(base, cases, timeout_s=options.timeout):
        path.write_text(json.dumps(facts | {"cases": rows}, indent=1) + "\n")
    return _conclude(rows, options.json)


def limits() -> dict[str, float]:
    """The largest relative errors that pass."""
    return {"gradient": GRADIENT, "loss": LOSS, "norm": NORM, "parameters": PARAMETERS}


def run_cases(
    base: Config,
    cases: Sequence[Case],
    *,
    timeout_s: float,
    before_case: Callable[[], None] | None = None,
    show: Callable[[str], None] = say,
) -> Iterator[list[dict[str, Any]]]:
    """Measure and judge `cases`; after each grid, the rows of all cases so far, one each, in order.

    A grid whose ranks fail or hang fails its cases with the reason; the others go on.

    Args:
        before_case: called on every rank before it builds an engine; tests plant faults with it.
    """
    device_type = resolve_device_type(base.train.device)
    references = _references(base, cases, device_type)
    show(f"parity: {len(cases)} cases, {len(references)} references computed")
    show(f"{'case':58} {'gradient':>9} {'loss':>8} {'norm':>8} {'params':>8}  verdict")
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for (world, pp, tp), group in groupby(cases, key=lambda case: (case.world, case.pp, case.tp)):
        same_grid = list(group)
        grid = Grid(pp=pp, dp=world // (pp * tp), tp=tp)
        mine = {case.model_key: references[case.model_key] for case in same_grid}
        try:
            found = run_ranks(
                _rank_cases,
                world,
                (base, same_grid, mine, grid, device_type, before_case),
                backend="nccl" if device_type == "cuda" else "gloo",
                timeout_s=timeout_s * (len(same_grid) + 1),
                preload=PRELOAD,
            )[0]
        except RankFailure as error:
            show(str(error))
            found = [Comparison(problems=["its ranks failed or hung, see above"]) for _ in same_grid]
        for case, comparison in zip(same_grid, found, strict=True):
            rows.append(_judge(case, comparison))
            show(_line(case, comparison, rows[-1]))
        left = (time.perf_counter() - start) / len(rows) * (len(cases) - len(rows))
        if left > 0:
            show(f"  {len(rows)}/{len(cases)} cases, {human_time(left)} left")
        yield rows


def _possible(worlds: Sequence[int], device_type: str) -> list[int]:
    """The numbers of ranks that this machine can start: on GPUs at most one for each."""
    gpus = torch.cuda.device_count() if device_type == "cuda" else max(worlds)
    left_out = [world for world in worlds if world > gpus]
    if left_out:
        say(f"parity: {gpus} GPUs here, so no layouts of {left_out} ranks; train.device=cpu runs them on the CPU")
    return [world for world in worlds if world <= gpus]


def _references(base: Config, cases: Sequence[Case], device_type: str) -> dict[str, Measured]:
    """The oracle's measurement of each model, on this process's CPU or first GPU."""
    set_numerics(torch.device(device_type), None, 1, tf32=False)
    chosen = {case.model_key: case for case in reversed(cases)}
    return {
        key: measure_reference(configure(base, Case(1, 1, 1, 0, 1, case.flavour, case.tied)), torch.device(device_type))
        for key, case in sorted(chosen.items())
    }


def _rank_cases(
    base: Config,
    cases: Sequence[Case],
    references: dict[str, Measured],
    grid: Grid,
    device_type: str,
    before_case: Callable[[], None] | None,
) -> list[Comparison]:
    """Body of one rank: all cases of one grid. Only rank 0's comparisons mean anything."""
    quiet_libraries(base.logging.verbose)
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    set_numerics(device, 1, grid.world_size, tf32=False)
    ctx = ParallelContext.create(grid, device)
    found = []
    for case in cases:
        if before_case is not None:
            before_case()
        measured = measure_ranks(configure(base, case), ctx)
        found.append(compare(measured, references[case.model_key]) if ctx.is_main else Comparison())
        gc.collect()
    return found


def _judge(case: Case, comparison: Comparison) -> dict[str, Any]:
    """A row with the list of what failed."""
    failed = list(comparison.problems)
    for name, limit in limits().items():
        error = getattr(comparison, name)
        if not error <= limit:
            at = getattr(comparison, f"{name}_at", "")
            failed.append(f"{name}{f' of {at}' if at else ''}: {error:.2e} > {limit:.0e}")
    return {"case": str(case), **comparison.as_dict(), "failed": failed}


def _line(case: Case, comparison: Comparison, row: dict[str, Any]) -> str:
    verdict = "; ".join(row["failed"]) or "ok"
    return (
        f"{case!s:58} {comparison.gradient:9.1e} {comparison.loss:8.1e} {comparison.norm:8.1e} "
        f"{comparison.parameters:8.1e}  {verdict}"
    )


def _conclude(rows: Sequence[dict[str, Any]], path: str) -> int:
    failed = [row for row in rows if row["failed"]]
    worst = max(rows, key=lambda row: row["gradient"])
    say(f"worst gradient error {worst['gradient']:.2e} ({worst['gradient_at']}, {worst['case']}); rows in {path}")
    for name in ("loss", "norm", "parameters"):
        say(f"worst {name} error {max(row[name] for row in rows):.2e} of {limits()[name]:.0e} allowed")
    if failed:
        say(f"parity FAILED in {len(failed)} of {len(rows)} cases")
        for row in failed:
            say(f"  {row['case']}: {'; '.join(row['failed'])}")
        return 1
    say(f"parity holds in all {len(rows)} cases")
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    def at_least(low: int) -> Callable[[str], list[int]]:
        def numbers(text: str) -> list[int]:
            found = [int(part) for part in text.split(",")]
            if min(found) < low:
                raise argparse.ArgumentTypeError(f"{min(found)} is below {low}")
            return found

        return numbers

    def words(*known: str) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            unknown = set(text.split(",")) - set(known)
            if unknown:
                raise argparse.ArgumentTypeError(f"unknown {sorted(unknown)}, known: {', '.join(known)}")
            return text.split(",")

        return split

    parser = argparse.ArgumentParser(
        prog="python -m engine.study parity",
        description="Compare every layout's raw gradients and five SGD steps with one process, in fp32. "
        "Everything that is not an option is an override of the configuration, such as model=gpt_tiny.",
    )
    parser.add_argument("--worlds", type=at_least(1), default=[1, 2, 4, 8], help="numbers of ranks (default 1,2,4,8)")
    parser.add_argument("--pp", type=at_least(1), default=[1, 2, 4], help="pipeline stages (default 1,2,4)")
    parser.add_argument("--tp", type=at_least(1), default=[1, 2, 4], help="tensor-parallel ranks (default 1,2,4)")
    parser.add_argument("--zero", type=at_least(0), default=[0, 1, 2, 3], help="ZeRO stages (default 0,1,2,3)")
    parser.add_argument("--accum", type=at_least(1), default=[1, 4], help="accumulation steps (default 1,4)")
    parser.add_argument("--flavours", type=words(*FLAVOURS), default=list(FLAVOURS), help="gpt2,llama")
    parser.add_argument("--tied", type=words("tied", "untied"), default=["tied", "untied"], help="tied,untied")
    parser.add_argument("--quick", action="store_true", help="a subset that covers every pair of values")
    parser.add_argument("--json", default="runs/parity.json", help="where the rows go (default runs/parity.json)")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds allowed per case (default 90)")
    return parser.parse_known_args(argv)
