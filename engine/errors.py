"""Errors a user can act on. Each violation names the option, its value, the rule and a way out.

Codes are stable, so that a message can be searched for: 1xx composing the config, 2xx layout, 3xx model and training
options, 4xx data, 5xx launch, 6xx run folder and weights, 7xx the DeepSpeed bridge.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

_FEW = 8
"""Names that are told whole beside the nearest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One broken rule: `option` (dotted, as typed on the command line), `value`, `rule` with numbers, `way_out`."""

    code: int
    option: str
    value: object
    rule: str
    way_out: str

    def __str__(self) -> str:
        return f"[OCT{self.code}] {self.option}={self.value}: {self.rule}. {self.way_out}"


class EngineError(Exception):
    """Base of every error that Octant raises on purpose. `violations` holds all that were found, not only the first."""

    exit_code = 2

    def __init__(self, violations: Violation | Sequence[Violation]) -> None:
        self.violations = (violations,) if isinstance(violations, Violation) else tuple(violations)
        super().__init__("\n".join(f"{i}. {v}" for i, v in enumerate(self.violations, start=1)))

    @classmethod
    def of(cls, code: int, option: str, value: object, rule: str, way_out: str) -> Self:
        """The error for a single broken rule."""
        return cls(Violation(code=code, option=option, value=value, rule=rule, way_out=way_out))


class ConfigError(EngineError):
    """An option is unknown, has the wrong type, or breaks a rule together with another option."""


class TopologyError(EngineError):
    """The ranks cannot be laid out as asked."""


class DataError(EngineError):
    """A corpus, tokenizer or token file is missing, damaged or too small."""


class LaunchError(EngineError):
    """The launcher's variables, the ranks or the devices do not fit the job."""


class CheckpointError(EngineError):
    """Weights or state on disk are missing, damaged or of another model."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A phrase naming the closest known spellings of `name`, and all known names when they are few or none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    if not close:
        return f"Known: {', '.join(known)}"
    among = f", of {', '.join(known)}" if len(close) < len(known) <= _FEW else ""
    return f"Nearest: {', '.join(close)}{among}"
