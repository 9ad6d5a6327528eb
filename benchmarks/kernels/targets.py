"""The figures that Octant's kernels are to reach, and whether rows show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.kernels.results import Row, figures

OCTANT = "octant triton"
AUTO = 1.03
CUDNN_SHARE = 0.80
DOCUMENTS = 2.5
LOSS_GIB = 0.5
LOSS_COMPILED = 1.05
ELEMENTWISE = 0.85
OPTIMIZER = 0.80


@dataclass(frozen=True, slots=True)
class Finding:
    """The figure that decides about a target, and what it is of."""

    met: bool
    figure: str


Find = Callable[[Sequence[Row]], Finding | None]
"""None: nothing was measured that could tell."""


def _worst(found: Sequence[tuple[float, str]], limit: float, *, at_least: bool, form: str) -> Finding | None:
    """By the worst of (value, what it is of), which is held against `limit`."""
    if not found:
        return None
    value, name = min(found) if at_least else max(found)
    met = value >= limit if at_least else value <= limit
    return Finding(
        met, f"{format(value, form)} ({name}; worst of {len(found)})" if len(found) > 1 else format(value, form)
    )


def _times(rows: Sequence[Row], system: str, metric: str, **facts: object) -> dict[str, float]:
    """p50 by case."""
    return {row["case"]: row["p50"] for row in figures(rows, system=system, metric=metric, **facts)}


def _complete(rows: Sequence[Row], system: str, found: Finding | None, **facts: object) -> Finding | None:
    """`found`, missed where `system` has no figure in a case."""
    missing = [
        row["case"]
        for row in rows
        if row["system"] == system and "unavailable" in row and all(row.get(k) == v for k, v in facts.items())
    ]
    if not missing:
        return found
    return Finding(False, f"{found.figure if found else ''} no figure for {', '.join(missing)}".strip())


def _auto(system: str) -> Find:
    def find(rows: Sequence[Row]) -> Finding | None:
        found = [(row["ratio"], row["case"]) for row in figures(rows, system=system)]
        return _complete(rows, system, _worst(found, AUTO, at_least=False, form=".3f"))

    return find


def _share_of_cudnn(rows: Sequence[Row]) -> Finding | None:
    facts: dict[str, object] = {"suite": "attention", "causal": True, "head_dim": 128}
    long = [row for row in rows if row.get("length", 0) >= 4096]
    ours, theirs = (_times(long, system, "fwd+bwd", **facts) for system in ("triton", "sdpa_cudnn"))
    found = [(theirs[case] / ours[case], case) for case in ours if case in theirs]
    return _complete(long, "triton", _worst(found, CUDNN_SHARE, at_least=True, form=".1%"), **facts)


def _documents(rows: Sequence[Row]) -> Finding | None:
    found = figures(rows, suite="documents", system="triton", unit="x")
    return _worst([(row["p50"], row["case"]) for row in found], DOCUMENTS, at_least=True, form=".2f")


def _loss_memory(rows: Sequence[Row]) -> Finding | None:
    found = _times(rows, OCTANT, "extra memory", suite="loss")
    return _worst([(value, case) for case, value in found.items()], LOSS_GIB, at_least=False, form=".3f")


def _loss_over(other: str, limit: float) -> Find:
    def find(rows: Sequence[Row]) -> Finding | None:
        ours, theirs = (_times(rows, system, "fwd+bwd", suite="loss") for system in (OCTANT, other))
        found = [(ours[case] / theirs[case], case) for case in ours if case in theirs]
        return _worst(found, limit, at_least=False, form=".3f")

    return find


def _of_copy(suite: str, phases: tuple[str, ...], limit: float) -> Find:
    def find(rows: Sequence[Row]) -> Finding | None:
        found = [
            (row["p50"], f"{row['case']} {phase}")
            for phase in phases
            for row in figures(rows, suite=suite, system=OCTANT, metric=f"of copy: {phase}")
        ]
        return _complete(rows, OCTANT, _worst(found, limit, at_least=True, form=".1%"), suite=suite)

    return find


def _faster_step(rows: Sequence[Row]) -> Finding | None:
    ours, theirs = (_times(rows, name, "step", suite="optimizer") for name in (OCTANT, "torch fused + copies"))
    found = [(theirs[case] / ours[case], case) for case in ours if case in theirs]
    return _worst(found, 1.0, at_least=True, form=".2f")


TARGETS: tuple[tuple[str, Find], ...] = (
    (f"auto: time at most {AUTO} of the best of all installed, in every case", _auto("auto")),
    (f"auto, flash_attn_4 removed: time at most {AUTO} of the best of the others", _auto("auto without flash_attn_4")),
    (f"triton: at least {CUDNN_SHARE:.0%} of sdpa_cudnn's speed, causal, H128, from 4k on", _share_of_cudnn),
    (f"triton inside documents: at least {DOCUMENTS} times dense causal attention", _documents),
    (f"loss: at most {LOSS_GIB} GiB beyond inputs and gradients", _loss_memory),
    ("loss: time at most 1.0 of Liger's", _loss_over("liger", 1.0)),
    (f"loss: time at most {LOSS_COMPILED} of compiled torch's", _loss_over("torch.compile", LOSS_COMPILED)),
    (f"elementwise: at least {ELEMENTWISE:.0%} of copy", _of_copy("elementwise", ("fwd", "bwd"), ELEMENTWISE)),
    (f"optimizer step: at least {OPTIMIZER:.0%} of copy", _of_copy("optimizer", ("step",), OPTIMIZER)),
    ("optimizer step: faster than torch's fused AdamW with copies (its time over ours)", _faster_step),
)


def target_lines(rows: Sequence[Row]) -> Iterator[str]:
    """A Markdown table: met, missed or not measured, and the figure. Quick runs measure nothing."""
    measured = [row for row in rows if not row["quick"]]
    yield "| target | | figure |"
    yield "|---|---|---|"
    for text, find in TARGETS:
        finding = find(measured)
        verdict = "not measured" if finding is None else "met" if finding.met else "missed"
        yield f"| {text} | {verdict} | {finding.figure if finding else ''} |"
