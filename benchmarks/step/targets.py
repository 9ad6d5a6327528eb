"""Whether rows show that the targets of the cases are reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.step.cases import CASES, Case, Kind, Target
from benchmarks.step.results import Row, figure
from benchmarks.step.systems import OCTANT, PLAIN, REFERENCE

LOSS = 0.005
"""Most by which a loss may differ from that in fp32, as a share of it: speed is not bought with wrong results."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What the rows show of a target."""

    met: bool
    figure: str


def _least(value: float, limit: float, form: str) -> Finding:
    return Finding(value >= limit, format(value, form))


def _plain(row: Row, target: Target, rows: Sequence[Row]) -> Finding | None:
    """Only what was measured in the same call on the same card is compared."""
    peers = [found for name in PLAIN if (found := figure(rows, row["case"], name)) and found["call"] == row["call"]]
    if not peers:
        return None
    best = max(peers, key=lambda found: found["tokens_per_s"])
    share = row["tokens_per_s"] / best["tokens_per_s"]
    return Finding(share >= target.limit, f"{share:.1%} of {best['system']}")


def _of_case(form: str) -> Callable[[Row, Target, Sequence[Row]], Finding | None]:
    def find(row: Row, target: Target, rows: Sequence[Row]) -> Finding | None:
        if (other := figure(rows, target.of, OCTANT)) is None:
            return None
        return _least(row["tokens_per_s_per_gpu"] / other["tokens_per_s_per_gpu"], target.limit, form)

    return find


def _bubble(row: Row, target: Target, rows: Sequence[Row]) -> Finding | None:
    other = figure(rows, target.of, OCTANT)
    if other is None:
        return None
    bubble = 1 - row["tokens_per_s_per_gpu"] / other["tokens_per_s_per_gpu"]
    points = 100 * (bubble - row["ideal_bubble"])
    return Finding(points <= target.limit, f"{points:+.1f}: {bubble:.1%}, ideal {row['ideal_bubble']:.1%}")


def _value(name: str, form: str, unit: float = 1.0) -> Callable[[Row, Target, Sequence[Row]], Finding]:
    return lambda row, target, rows: _least(row[name] / unit, target.limit, form)


_FIND: dict[Kind, Callable[[Row, Target, Sequence[Row]], Finding | None]] = {
    Kind.rate: _value("tokens_per_s_per_gpu", ",.0f"),
    Kind.plain: _plain,
    Kind.case: _of_case(".1%"),
    Kind.faster: _of_case(".2f"),
    Kind.samples: _value("samples_per_s", ",.0f"),
    Kind.tflops: _value("tflops_c", ",.0f"),
    Kind.bubble: _bubble,
    Kind.seq_len: _value("seq_len", ",.0f"),
    Kind.parameters: _value("parameters", ".2f", 1e9),
}


def loss_difference(row: Row, rows: Sequence[Row]) -> float | None:
    """(loss - loss in fp32) / loss in fp32, at the step of the reference; None where one of them is not there."""
    reference = figure(rows, row["case"], REFERENCE, "loss")
    loss = None if reference is None else row["losses"].get(str(reference["step"]))
    return None if reference is None or loss is None else (loss - reference["p50"]) / reference["p50"]


def _loss(case: Case, rows: Sequence[Row]) -> Finding | None:
    row = figure(rows, case.name, OCTANT)
    difference = None if row is None else loss_difference(row, rows)
    return None if difference is None else Finding(abs(difference) <= LOSS, f"{difference:+.3%}")


def target_lines(rows: Sequence[Row]) -> Iterator[str]:
    """A Markdown table: met, missed or not measured, and the figure or why there is none. Quick runs measure nothing.

    Args:
        rows: of one kind of hardware.
    """
    measured = [row for row in rows if not row["quick"]]
    yield "| case | target | | figure |"
    yield "|---|---|---|---|"
    for case in CASES.values():
        row = figure(measured, case.name, OCTANT)
        refused = figure(measured, case.name, OCTANT, "unavailable")
        for target in case.targets:
            finding = None if row is None else _FIND[target.kind](row, target, measured)
            yield _line(case.name, target.text, finding, refused)
        if case.reference_step:
            text = f"loss within {LOSS:.1%} of that in fp32"
            yield _line(case.name, text, _loss(case, measured), refused)


def _line(case: str, text: str, finding: Finding | None, refused: Row | None) -> str:
    if finding is not None:
        return f"| {case} | {text} | {'met' if finding.met else 'missed'} | {finding.figure} |"
    if refused is not None:
        return f"| {case} | {text} | missed | {refused['unavailable'].replace('|', '/')} |"
    return f"| {case} | {text} | not measured | |"
