"""The copy that kernels bound by memory are held against, sampled in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contest import BOTH, Bench, Case, Entrant
from benchmarks.kernels.timing import Times

COPY = "copy"
OF_COPY = "of copy: "
"""What stands before the phase in the metric of a bandwidth over that of the copy."""
MOST_BYTES = 4 * 2**30
"""Read and written by a copy at most; one that is longer is no faster."""


def copy_entrant(device: torch.device, bytes_of: Mapping[str, float]) -> Entrant:
    """Copies that move as many bytes as each phase does, reading and writing, up to `MOST_BYTES`."""
    phases: dict[str, Any] = {}
    for phase, count in bytes_of.items():
        # Half is read, half written, two bytes an element.
        source = torch.ones(max(1, int(min(count, MOST_BYTES)) // 4), dtype=torch.bfloat16, device=device)
        phases[phase] = _copy(torch.empty_like(source), source)
    return Entrant(phases, ())


def _copy(target: Tensor, source: Tensor) -> Any:
    return lambda: target.copy_(source)


def copy_case(case: Case) -> Case:
    """What the copy does in the rounds of `case`."""
    work = {phase: float(min(count, MOST_BYTES)) for phase, count in case.work.items()}
    return Case(case.name, work, case.rate, case.facts, lambda results: {})


def write_of_copy(bench: Bench, case: Case, times: Times) -> None:
    """A row for each system and phase: its bandwidth over that of the copy of the same round."""
    if COPY not in times:
        return
    moved, copied = dict(case.work), dict(copy_case(case).work)
    for work in (moved, copied):
        if {"fwd", "bwd"} <= set(work):
            work[BOTH] = work["fwd"] + work["bwd"]
    for name, phases in times.items():
        if name == COPY:
            continue
        shown = []
        for phase, values in phases.items():
            more = moved[phase] / copied[phase]
            ratios = [more * one / other for one, other in zip(times[COPY][phase], values, strict=True)]
            bench.sheet.add(case.name, name, OF_COPY + phase, "ratio", ratios, **case.facts)
            shown.append(f"{phase} {median(ratios):.1%}")
        print(f"  {name}: of copy {', '.join(shown)}", flush=True)
