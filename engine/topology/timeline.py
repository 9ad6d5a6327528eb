"""When the stages of a pipeline did what, predicted or measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.errors import EngineError, TopologyError
from engine.topology.program import COMPUTE, Op, OpKind

Row = dict[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Event:
    """When an operation ran, in seconds. A receive: from when the stage began to wait to when it had the message."""

    stage: int
    op: Op
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step; time 0 is its start."""

    events: tuple[tuple[Event, ...], ...]
    """Stage -> its events in order. Every stage has at least one."""

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Timeline:
        """Measured events of all stages, in any order, on one clock; the earliest start becomes time 0.

        Raises:
            TopologyError: (220) no event at all, a stage without events, or an event that ends before it starts.
        """
        found = sorted(events, key=lambda event: (event.stage, event.start, event.end))
        stages = range(found[-1].stage + 1) if found else range(1)
        for stage in stages:
            if not any(event.stage == stage for event in found):
                raise _refused(f"stage {stage}", "it has no event", "Give at least one event of every stage from 0 on")
        for event in found:
            if not (event.stage >= 0 and event.start <= event.end):
                rule = f"stage {event.stage} from {event.start} s to {event.end} s"
                raise _refused(event.op, rule, "Use a stage from 0 on and an end that is not before the start")
        zero = min(event.start for event in found)
        moved = [Event(event.stage, event.op, event.start - zero, event.end - zero) for event in found]
        return cls(tuple(tuple(event for event in moved if event.stage == stage) for stage in stages))

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, object]]) -> Timeline:
        """The timeline that `to_rows` was called on, from its rows in any order. Raises `TopologyError` (220)."""
        return cls.from_events([_event(number, row) for number, row in enumerate(rows)])

    def to_rows(self) -> list[Row]:
        """One plain dict per event, for JSON: stage, kind, micro_batch, chunk, start and end."""
        return [
            {
                "stage": event.stage,
                "kind": event.op.kind.value,
                "micro_batch": event.op.micro_batch,
                "chunk": event.op.chunk,
                "start": event.start,
                "end": event.end,
            }
            for events in self.events
            for event in events
        ]

    @property
    def makespan(self) -> float:
        """Seconds until the last stage is done."""
        return max(event.end for events in self.events for event in events)

    @property
    def ideal(self) -> float:
        """Seconds the step would take if its forward and backward passes were shared evenly and nobody waited."""
        return sum(self.busy(stage) for stage in range(len(self.events))) / len(self.events)

    @property
    def bubble(self) -> float:
        """Idle share of all stages' time, 0..1: 1 - ideal / makespan."""
        return 1 - self.ideal / self.makespan if self.makespan else 0.0

    def busy(self, stage: int) -> float:
        """Seconds that `stage` spends in forward and backward passes."""
        return sum(event.end - event.start for event in self.events[stage] if event.op.kind in COMPUTE)

    def peak_in_flight(self, stage: int) -> int:
        """Most activations `stage` holds at once in a training step, one unit per chunk and micro-batch."""
        held = peak = 0
        for event in self.events[stage]:
            held += (event.op.kind is OpKind.forward) - (event.op.kind is OpKind.backward)
            peak = max(peak, held)
        return peak


def _event(number: int, row: Mapping[str, object]) -> Event:
    way_out = "Give stage, kind, micro_batch, chunk, start and end, as Timeline.to_rows does"
    if missing := {"stage", "kind", "micro_batch", "chunk", "start", "end"} - set(row):
        raise _refused(dict(row), f"row {number} has no {', '.join(sorted(missing))}", way_out)
    try:
        stage, micro_batch, chunk = (int(str(row[name])) for name in ("stage", "micro_batch", "chunk"))
        start, end = (float(str(row[name])) for name in ("start", "end"))
        return Event(stage, Op(OpKind(str(row["kind"])), micro_batch, chunk), start, end)
    except ValueError as error:
        raise _refused(dict(row), f"row {number} is no event: {error}", way_out) from error


def _refused(value: object, rule: str, way_out: str) -> EngineError:
    return TopologyError.of(220, "timeline", value, rule, way_out)
