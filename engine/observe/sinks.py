"""Where metrics go: a JSONL file always, Weights & Biases on request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from engine.config.enums import WandbMode
from engine.observe.log import say, warn


class MetricSink(Protocol):
    """Receives the metrics of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` (name -> value) of `step` (1 is the first)."""

    def close(self) -> None:
        """Finish writing. Nothing may be written afterwards."""


def json_number(value: float) -> float | str:
    """`value` as strict JSON can hold it: not-a-number and infinities become "nan", "inf" and "-inf"."""
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else str(value)


class JsonlSink:
    """One JSON object per line: `{"step": 1, "loss": 10.8, ...}`.

    Every line is flushed, so that a killed run keeps all its steps. Floats are written with all their digits.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {"step": step, **{name: json_number(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandbSink:
    """A Weights & Biases run. Trouble with it is a warning: training goes on without it."""

    def __init__(
        self, project: str, name: str, folder: Path, mode: WandbMode, config: Mapping[str, Any] | None = None
    ) -> None:
        """Start the run.

        Args:
            folder: where W&B keeps its own files.
            config: the resolved configuration, shown beside the curves.
        """
        self._mode = mode
        self._run: Any = None
        if mode is WandbMode.disabled:
            return
        try:
            wandb: Any = import_module("wandb")
            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(folder),
                mode=mode.value,
                config=dict(config or {}),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:
            self._give_up("could not start", error)
            return
        if mode is WandbMode.online:
            say(f"W&B run: {self._run.url}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            try:
                self._run.log(dict(metrics), step=step)
            except Exception as error:
                self._give_up("stopped", error)

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up("could not finish", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        reason = str(error) or type(error).__name__
        warn(
            f"logging.wandb={self._mode.value}: W&B {what} ({reason}). Training goes on; metrics.jsonl holds every "
            "metric. Use logging.wandb=offline or logging.wandb=disabled to avoid this"
        )


class Fanout:
    """Passes everything to several sinks. `close` closes each of them, even when one fails."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        with ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)
