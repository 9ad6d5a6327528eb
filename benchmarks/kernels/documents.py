"""Suite `documents`: causal attention inside the documents of packed rows, next to dense causal attention.

Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.kernels.attention import entrant, facts_of, inputs_of, work_of, write_auto
from benchmarks.kernels.attention_systems import AttentionCase, systems
from benchmarks.kernels.contest import BOTH, Bench, Case, contest
from benchmarks.kernels.exact import attention_judge, last_head
from benchmarks.kernels.timing import Times
from engine_kernels.documents import Documents

DENSE = "dense "
"""What stands before the names of systems that see whole rows."""
SPEED = "speed over dense causal"
_SPREAD = 0.8
"""Standard deviation of the logarithms of lengths."""


def lengths_of_documents(rows: int, length: int, mean: float, seed: int = 0) -> list[int]:
    """Log-normal lengths that fill `rows` rows one after the other; the last document of each is cut at its end."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.tensor(mean).log() - _SPREAD**2 / 2
    found: list[int] = []
    for _ in range(rows):
        left = length
        while left:
            drawn = float((middle + _SPREAD * torch.randn((), generator=generator)).exp())
            found.append(min(left, max(1, round(drawn))))
            left -= found[-1]
    return found


def run(bench: Bench) -> None:
    """The one case: two rows of 8192 positions, documents of 1024 in the mean."""
    rows, length, heads, head_dim, mean = (2, 32, 2, 16, 8.0) if bench.quick else (2, 8192, 16, 128, 1024.0)
    shape: dict[str, Any] = {
        "batch": rows,
        "length": length,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "causal": True,
    }
    pieces = lengths_of_documents(rows, length, mean)
    packed, dense = AttentionCase(**shape, pieces=tuple(pieces)), AttentionCase(**shape)
    starts = torch.tensor([0, *pieces]).cumsum(0).int()
    documents = Documents(starts, max(pieces)).to(bench.device)
    leaves, dout = inputs_of(packed, bench.device)
    q, k, v = leaves
    exact = [last_head(q, k, v, dout, causal=True, documents=which) for which in (documents, None)]
    work, dense_work = work_of(packed), work_of(dense)
    facts = {**facts_of(packed), "pieces": len(pieces), "longest": max(pieces)}
    entry = Case(packed.name, work, "tflops", facts, attention_judge(exact[0]))
    whole = Case(packed.name, dense_work, "tflops", {**facts, "documents": False}, attention_judge(exact[1]))
    builds = systems(packed, bench.device, documents=documents)
    dense_builds = {DENSE + name: build for name, build in systems(dense, bench.device).items() if name in builds}
    makers = {name: partial(entrant, build, leaves, dout) for name, build in (builds | dense_builds).items()}
    times = contest(bench, entry, makers, 1, dict.fromkeys(dense_builds, whole))
    _write_speed(bench, entry, times, dense_work["fwd"] / work["fwd"])
    write_auto(bench, entry, packed, {name: phases for name, phases in times.items() if not name.startswith(DENSE)})


def _write_speed(bench: Bench, entry: Case, times: Times, less_work: float) -> None:
    """Time of dense causal attention over that inside documents: of the same system, else of the best."""
    whole = {name: phases[BOTH] for name, phases in times.items() if name.startswith(DENSE)}
    if not whole:
        return
    best = min(whole, key=lambda name: median(whole[name]))
    for name, phases in times.items():
        if name in whole:
            continue
        over = DENSE + name if DENSE + name in whole else best
        values = [one / other for one, other in zip(whole[over], phases[BOTH], strict=True)]
        facts = {"over": over, "over_best": median(whole[best]) / median(phases[BOTH]), "best": best}
        bench.sheet.add(entry.name, name, SPEED, "x", values, **entry.facts, **facts, less_work=less_work)
        print(f"  {name}: {median(values):.2f}x {over}, {facts['over_best']:.2f}x {best}", flush=True)
