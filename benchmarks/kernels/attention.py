"""Suite `attention`: all implementations over sequence lengths of 1k to 64k, 16k tokens or one row at a time.

Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.kernels.attention_systems import AttentionCase, Build, situation, systems
from benchmarks.kernels.contest import BOTH, Bench, Case, Entrant, contest, differentiable
from benchmarks.kernels.exact import attention_judge, last_head
from benchmarks.kernels.timing import Times
from engine_kernels import registry

TOKENS = 16384
HEADS = {64: 32, 128: 16}
REMOVED = "flash_attn_4"
"""What `auto` is asked without, once more: not everyone has it."""


def cases(quick: bool) -> Iterator[AttentionCase]:
    """The most important first."""
    if quick:
        yield AttentionCase(batch=2, length=32, heads=2, kv_heads=2, head_dim=16, causal=True)
        yield AttentionCase(batch=1, length=40, heads=4, kv_heads=1, head_dim=16, causal=False)
        return
    kilo = 1024
    order = [(dim, length * kilo, True) for dim in (128, 64) for length in (4, 8, 1, 2, 16)]
    order += [(dim, length * kilo, True) for length in (32, 64) for dim in (128, 64)]
    order += [(dim, length * kilo, False) for dim in (128, 64) for length in (4, 8, 1, 2, 16)]
    grouped = AttentionCase(batch=4, length=4 * kilo, heads=16, kv_heads=4, head_dim=128, causal=True)
    for number, (dim, length, causal) in enumerate(order):
        if number == 10:
            yield grouped
        heads, batch = HEADS[dim], max(1, TOKENS // length)
        yield AttentionCase(batch=batch, length=length, heads=heads, kv_heads=heads, head_dim=dim, causal=causal)


def inputs_of(case: AttentionCase, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k and v that want gradients, and the output's gradient: bf16, from a fixed seed."""
    generator = torch.Generator(device).manual_seed(case.length + case.head_dim)
    draw = partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    q, k, v = (draw(case.batch, case.length, n, case.head_dim) for n in (case.heads, case.kv_heads, case.kv_heads))
    return [x.requires_grad_() for x in (q, k, v)], draw(q.shape)


def facts_of(case: AttentionCase) -> dict[str, Any]:
    """What a row says of its case."""
    facts = {key: value for key, value in asdict(case).items() if key != "pieces"}
    return {"suite": "documents" if case.pieces else "attention", **facts, "documents": bool(case.pieces)}


def work_of(case: AttentionCase) -> dict[str, float]:
    """Floating point operations: two products forward, five backward; half of them where attention is causal."""
    lengths = [float(length) for length in case.pieces] or [float(case.length)] * case.batch
    forward = sum(4 * case.heads * case.head_dim * length**2 for length in lengths) / (2 if case.causal else 1)
    return {"fwd": forward, "bwd": 2.5 * forward}


def run(bench: Bench, tutorial: str | None = None) -> None:
    """All cases, until the time is over."""
    todo = list(cases(bench.quick))
    for number, case in enumerate(todo):
        if bench.budget.over():
            print(f"attention: out of time, {len(todo) - number} cases left", flush=True)
            return
        leaves, dout = inputs_of(case, bench.device)
        q, k, v = leaves
        exact = last_head(q, k, v, dout, causal=case.causal, documents=None)
        makers = {
            name: partial(entrant, build, leaves, dout) for name, build in systems(case, bench.device, tutorial).items()
        }
        entry = Case(case.name, work_of(case), "tflops", facts_of(case), attention_judge(exact))
        times = contest(bench, entry, makers, len(todo) - number)
        write_auto(bench, entry, case, times)


def entrant(build: Build, leaves: list[Tensor], dout: Tensor) -> Entrant:
    """A system on these inputs, laid out as it wants them."""
    system = build()
    inputs = [system.lay_out(x.detach()).requires_grad_() for x in leaves] if system.lay_out else leaves
    grads = [system.lay_out(dout) if system.lay_out else dout]
    found = differentiable(system.call, inputs, grads)
    results = [system.lay_out(x) for x in found.results] if system.lay_out else found.results
    return Entrant(found.phases, results, {**found.facts, **system.facts})


def write_auto(bench: Bench, entry: Case, case: AttentionCase, times: Times) -> None:
    """Which implementation `auto` takes and its time over the best of all, with and without `REMOVED`."""
    medians = {name: median(phases[BOTH]) for name, phases in times.items()}
    for system, gone in (("auto", ""), (f"auto without {REMOVED}", REMOVED)):
        left = {name: seconds for name, seconds in medians.items() if name != gone}
        try:
            chosen = chosen_by_auto(case, bench.device, gone)
        except registry.KernelUnavailable as error:
            bench.sheet.unavailable(entry.name, system, str(error), **entry.facts)
            continue
        if chosen not in left:
            why = f"auto takes {chosen}, which was not timed"
            bench.sheet.unavailable(entry.name, system, why, **entry.facts)
            continue
        best = min(left, key=lambda name: left[name])
        ratio = left[chosen] / left[best]
        facts: Mapping[str, Any] = {**entry.facts, "chosen": chosen, "best": best, "ratio": ratio}
        bench.sheet.add(entry.name, system, f"{BOTH} over the best", "ratio", [ratio], **facts)
        print(f"  {system}: {chosen}, {ratio:.3f} of {best}", flush=True)


def chosen_by_auto(case: AttentionCase, device: torch.device, removed: str) -> str:
    """Name of the implementation that `auto` takes where `removed` is not installed."""
    left = [impl for impl in registry.implementations("attention") if impl.name != removed]
    with patch.dict(registry._IMPLS, {"attention": left}):
        return registry.choose("attention", "auto", situation(case, device)).impl.name
