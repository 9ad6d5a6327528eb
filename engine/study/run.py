"""Measure and judge cases: the oracle in this process, the cases of a grid together in one set of ranks."""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.config.enums import DType
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.dist.init import resolve_device_type, set_numerics
from engine.dist.spawn import RankFailure, backend_of, run_ranks
from engine.observe.log import quiet_libraries, say
from engine.observe.progress import human_time
from engine.study.cases import Case, alone, configure, model_key, oracle_config
from engine.study.compare import Comparison, compare, compare_low, limits
from engine.study.measure import Measured, measure_oracle, measure_ranks
from engine.topology.grid import Grid

PRELOAD = ["engine.train.session", "engine.runtime.pipeline", "engine.runtime.zero"]

Row = dict[str, Any]
"""case (words), settings, errors, at, failed: one row of the report."""


def run_cases(
    base: Config,
    cases: Sequence[Case],
    *,
    timeout_s: float,
    before_case: Callable[[], None] | None = None,
    show: Callable[[str], None] = say,
) -> Iterator[list[Row]]:
    """Measure and judge `cases`, in the dtype of `base`; after each grid, the rows of all cases so far.

    A grid whose ranks fail or hang fails its cases with the reason; the others go on.

    Args:
        before_case: called on every rank before it builds an engine; tests plant faults with it.
    """
    cases = sorted(cases, key=lambda case: case.grid)
    device_type, dtype = resolve_device_type(base.train.device), base.precision.dtype
    with tempfile.TemporaryDirectory(prefix="octant-parity-") as folder:
        count = len(_by_model(base, cases))
        _start(
            _rank_oracles,
            _helpers(count, device_type),
            (base, cases, folder, device_type),
            device_type,
            timeout_s * (count + 1),
        )
        if dtype is not DType.fp32:
            _start(_rank_baselines, 1, (base, cases, folder, device_type), device_type, timeout_s * (count + 1))
        show(f"parity: {len(cases)} cases, {count} references computed")
        kinds = limits(dtype)
        show(" ".join([f"{'case':100}", *(f"{kind:>9}" for kind in kinds), " verdict"]))
        rows: list[Row] = []
        start = time.perf_counter()
        for _, group in groupby(cases, key=lambda case: case.grid):
            same = list(group)
            try:
                found = _start(
                    _rank_cases,
                    same[0].world,
                    (base, same, folder, device_type, before_case),
                    device_type,
                    timeout_s * (len(same) + 1),
                )
            except RankFailure as error:
                show(str(error))
                problem = "its ranks failed or hung, see above; --timeout allows each case more seconds"
                found = [Comparison(problems=[problem]) for _ in same]
            for case, comparison in zip(same, found, strict=True):
                rows.append(judge(case, comparison, dtype))
                show(_line(rows[-1], kinds))
            left = (time.perf_counter() - start) / len(rows) * (len(cases) - len(rows))
            if left > 0:
                show(f"  {len(rows)}/{len(cases)} cases, {human_time(left)} left")
            yield rows


def judge(case: Case, comparison: Comparison, dtype: DType = DType.fp32) -> Row:
    """A row with the list of what failed."""
    failed = comparison.failures(limits(dtype))
    return {
        "case": str(case),
        "settings": asdict(case),
        "errors": comparison.errors,
        "at": comparison.at,
        "failed": failed,
    }


def _line(row: Row, kinds: dict[str, float]) -> str:
    errors = (f"{row['errors'].get(kind, float('nan')):9.1e}" for kind in kinds)
    return " ".join([f"{row['case']:100}", *errors, " " + ("; ".join(row["failed"]) or "ok")])


def _start(
    fn: Callable[..., Any], world: int, args: tuple[object, ...], device_type: str, timeout_s: float
) -> list[Comparison]:
    """What rank 0 of `world` ranks returns."""
    backend = backend_of(device_type, world)
    found: list[Comparison] = run_ranks(fn, world, args, backend=backend, timeout_s=timeout_s, preload=PRELOAD)[0]
    return found


def _oracle_file(folder: str | Path, key: str) -> Path:
    return Path(folder, f"{key}.oracle")


def _baseline_file(folder: str | Path, key: str) -> Path:
    return Path(folder, f"{key}.baseline")


def _read(path: Path) -> Measured:
    measured: Measured = pickle.loads(path.read_bytes())
    return measured


def _by_model(base: Config, cases: Sequence[Case]) -> dict[str, Case]:
    return {model_key(base, case): case for case in reversed(cases)}


def _enter(base: Config, device_type: str, world: int) -> torch.device:
    """The device of a rank that has just started."""
    quiet_libraries(base.logging.verbose)
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    set_numerics(device, 1, world, tf32=False)
    # What was imported is never garbage; collecting is quick without it.
    gc.freeze()
    return device


def _helpers(models: int, device_type: str) -> int:
    """Processes that compute the oracles side by side: a core each, at most 4."""
    return 1 if device_type == "cuda" else min(models, os.cpu_count() or 1, 4)


def _rank_oracles(base: Config, cases: Sequence[Case], folder: str, device_type: str) -> list[Comparison]:
    """The oracle's measurement of each model, shared out over the processes, to a file each.

    Files, because each rank would get all of them as arguments, and only one reads them.
    """
    device, rank, helpers = _enter(base, device_type, 1), dist.get_rank(), dist.get_world_size()
    for key, case in list(_by_model(base, cases).items())[rank::helpers]:
        _oracle_file(folder, key).write_bytes(pickle.dumps(measure_oracle(oracle_config(base, case), device)))
    return []


def _rank_baselines(base: Config, cases: Sequence[Case], folder: str, device_type: str) -> list[Comparison]:
    """One rank in the dtype of `base`: its measurement of each model, to a file each."""
    ctx = ParallelContext.create(Grid(), _enter(base, device_type, 1))
    for key, case in _by_model(base, cases).items():
        cfg = configure(base, alone(case, zero=1))
        cfg.model.num_layers = configure(base, case).model.num_layers
        _baseline_file(folder, key).write_bytes(pickle.dumps(measure_ranks(cfg, ctx)))
    return []


def _rank_cases(
    base: Config,
    cases: Sequence[Case],
    folder: str,
    device_type: str,
    before_case: Callable[[], None] | None,
) -> list[Comparison]:
    """Body of one rank: all cases of one grid. Only rank 0's comparisons mean anything."""
    first = cases[0]
    grid = Grid(pp=first.pp, dp=first.dp, cp=first.context, tp=first.tp)
    ctx = ParallelContext.create(grid, _enter(base, device_type, first.world))
    found = []
    for case in cases:
        if before_case is not None:
            before_case()
        measured = measure_ranks(configure(base, case), ctx)
        found.append(_compare(base, case, measured, folder) if ctx.is_main else Comparison())
    return found


def _compare(base: Config, case: Case, measured: Measured, folder: str) -> Comparison:
    key = model_key(base, case)
    oracle = _read(_oracle_file(folder, key))
    dtype = base.precision.dtype
    if dtype is DType.fp32:
        return compare(measured, oracle)
    return compare_low(measured, _read(_baseline_file(folder, key)), oracle, dtype)
