"""One case and the systems that enter it: each is built, its results are judged, and those that pass are timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.sheet import Sheet
from benchmarks.kernels.timing import Budget, Call, Timer, Times, reason

LONGEST_SHARE_S = 3.0
"""Seconds of samples of one case at most."""
BUILD_SHARE = 1 / 3
"""Of a suite's time that one system may spend on being built, which is mostly compiling."""
BOTH = "fwd+bwd"


class Unavailable(RuntimeError):
    """A system has no part in a case. The message is the reason."""


Judge = Callable[[Sequence[Tensor]], dict[str, float]]
"""Errors of results as facts for the rows. Raises `Unavailable` where they are wrong."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A system ready to be timed."""

    phases: Mapping[str, Call]
    results: Sequence[Tensor]
    """What a first call gave, to be judged."""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    name: str
    work: Mapping[str, float]
    """Floating point operations or bytes of each phase."""
    rate: str
    """Name of work over time in a row: `tflops` (1e12) or `gb_per_s` (1e9)."""
    facts: Mapping[str, Any]
    judge: Judge


@dataclass(frozen=True)
class Bench:
    """What the suites share."""

    sheet: Sheet
    timer: Timer
    budget: Budget
    without: frozenset[str] = frozenset()
    """Systems that are left out."""
    built_s: dict[str, float] = field(default_factory=dict)
    """What building each system has taken so far."""

    @property
    def device(self) -> torch.device:
        return self.sheet.device

    @property
    def quick(self) -> bool:
        return self.sheet.quick


def apart(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`; NaN where one is in either. In pieces of 64 MB."""
    if found.shape != wanted.shape:
        raise Unavailable(f"wrong result: shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    total, scale = 0.0, 0.0
    for one, other in zip(found.reshape(-1).split(2**24), wanted.reshape(-1).split(2**24), strict=True):
        exact = other.float()
        total += float((one.float() - exact).square().sum())
        scale += float(exact.square().sum())
    return (total / scale) ** 0.5 if scale else total**0.5


def judge_by(wanted: Sequence[Tensor], limit: float) -> Judge:
    """Results are `wanted` up to `limit`, by the worst of them."""

    def judge(found: Sequence[Tensor]) -> dict[str, float]:
        if len(found) != len(wanted):
            raise Unavailable(f"wrong result: {len(found)} tensors, not {len(wanted)}")
        errors = [apart(one, other) for one, other in zip(found, wanted, strict=True)]
        return {"error": accepted(errors, limit)}

    return judge


def accepted(errors: Sequence[float], limit: float) -> float:
    """The largest of `errors`, none of which is above `limit` or NaN."""
    if not all(error <= limit for error in errors):
        raise Unavailable(f"wrong result: relative errors {', '.join(f'{e:.1e}' for e in errors)}, limit {limit:.0e}")
    return max(errors)


def differentiable(fn: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> Entrant:
    """`fn(*inputs)` as phases `fwd` and `bwd`, the latter on a graph that is kept; results: outputs, then gradients."""
    leaves = [x for x in inputs if x.requires_grad]
    start = time.perf_counter()
    kept = _tuple(fn(*inputs))

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kept, leaves, grads, retain_graph=True)

    # A copy: some systems write where they have read before.
    results = [x.detach().clone() for x in (*kept, *backward())]
    return Entrant(
        {"fwd": lambda: fn(*inputs), "bwd": backward}, results, {"first_call_s": time.perf_counter() - start}
    )


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def contest(
    bench: Bench,
    case: Case,
    makers: Mapping[str, Callable[[], Entrant]],
    cases_left: int,
    others: Mapping[str, Case] | None = None,
) -> Times:
    """Build, judge and time the systems, and write their rows.

    Args:
        others: for systems that do other work in the same rounds, what this is.
        makers: builds each system's calls; whatever they raise is the reason in a row "unavailable".
        cases_left: cases of the suite from this one on, which share what is left of its time.

    Returns:
        Seconds of the samples of each system that passed; `fwd+bwd` is added where there are `fwd` and `bwd`.
    """
    print(f"{case.name} ({bench.budget.left():.0f} s left)", flush=True)
    of = {name: (others or {}).get(name, case) for name in makers}
    entrants, errors = _built(bench, of, makers)
    share = min(LONGEST_SHARE_S, bench.budget.left() / cases_left)
    times, failed = bench.timer.rounds({name: entrant.phases for name, entrant in entrants.items()}, share)
    for name, why in failed.items():
        bench.sheet.unavailable(of[name].name, name, why, **of[name].facts)
    for name, phases in times.items():
        if {"fwd", "bwd"} <= set(phases):
            phases[BOTH] = [one + other for one, other in zip(phases["fwd"], phases["bwd"], strict=True)]
        _write(bench, of[name], name, phases, {**entrants[name].facts, **errors[name]})
    entrants.clear()
    clean(bench.device)
    return times


def _built(
    bench: Bench, of: Mapping[str, Case], makers: Mapping[str, Callable[[], Entrant]]
) -> tuple[dict[str, Entrant], dict[str, dict[str, float]]]:
    entrants: dict[str, Entrant] = {}
    errors: dict[str, dict[str, float]] = {}
    for name, make in makers.items():
        if name in bench.without:
            continue
        why = ""
        try:
            entrant = _build(bench, name, make)
            errors[name] = of[name].judge(entrant.results)
            entrants[name] = Entrant(entrant.phases, (), entrant.facts)
        except Unavailable as error:
            why = str(error)
        except Exception as error:
            why = reason(error)
        if why:
            # Only now: the traceback held the frames, and these the memory.
            bench.sheet.unavailable(of[name].name, name, why, **of[name].facts)
            clean(bench.device)
    return entrants, errors


def _build(bench: Bench, name: str, make: Callable[[], Entrant]) -> Entrant:
    if bench.budget.over():
        raise Unavailable("the suite's time was used up")
    if bench.built_s.get(name, 0.0) > BUILD_SHARE * bench.budget.seconds:
        raise Unavailable("compiling it for earlier cases took too much of the suite's time")
    start = time.perf_counter()
    try:
        return make()
    finally:
        bench.built_s[name] = bench.built_s.get(name, 0.0) + time.perf_counter() - start


def _write(bench: Bench, case: Case, name: str, phases: Mapping[str, list[float]], facts: Mapping[str, Any]) -> None:
    unit = {"tflops": 1e12, "gb_per_s": 1e9}[case.rate]
    work = dict(case.work)
    if {"fwd", "bwd"} <= set(work):
        work[BOTH] = work["fwd"] + work["bwd"]
    shown = []
    for phase, values in phases.items():
        more: dict[str, Any] = {"repeats": bench.timer.repeats.get(f"{name} {phase}", 1)}
        if phase in work:
            more[case.rate] = work[phase] / median(values) / unit
        entry = bench.sheet.add(case.name, name, phase, "s", values, **case.facts, **facts, **more)
        shown.append(f"{phase} {entry['p50'] * 1e3:.3f} ms {more.get(case.rate, 0.0):.0f}")
    print(f"  {name}: {', '.join(shown)} {case.rate} n {len(values)}", flush=True)


def clean(device: torch.device) -> None:
    """Give back memory that nothing holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
