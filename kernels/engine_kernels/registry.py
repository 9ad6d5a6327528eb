"""Which implementation runs an operation: decided once, before the model is built, with reasons against the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Situation:
    """What an implementation needs to know to say whether it can run."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int = 0
    dropout: bool = False
    """Attention weights are dropped."""
    documents: bool = False
    """Attention stays inside the documents of packed rows."""


@dataclass(frozen=True, slots=True)
class Impl:
    """One implementation of `op`. `supports` returns None when it can run, otherwise the reason why not."""

    op: str
    name: str
    supports: Callable[[Situation], str | None]
    fn: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen implementation and what was said of the others."""

    impl: Impl
    refused: tuple[tuple[str, str], ...]
    """(name, reason) of each implementation that was passed over because it cannot run."""

    def __str__(self) -> str:
        passed_over = "".join(f"; not {name}: {reason}" for name, reason in self.refused)
        return f"{self.impl.op}: {self.impl.name}{passed_over}"


class KernelUnavailable(ValueError):
    """An implementation was asked for by name and cannot run here. The message holds the reason."""


_IMPLS: dict[str, list[Impl]] = {}


def register(impl: Impl) -> None:
    """Add an implementation. The order of registration is the order of preference of `auto`."""
    _IMPLS.setdefault(impl.op, []).append(impl)


def implementations(op: str) -> list[Impl]:
    """All implementations of `op`, preferred first."""
    return list(_IMPLS.get(op, []))


def choose(op: str, name: str, situation: Situation) -> Choice:
    """The implementation called `name`, or for `auto` the first that can run.

    Raises:
        KernelUnavailable: `name` is unknown or cannot run here, or nothing can.
    """
    refused: list[tuple[str, str]] = []
    for impl in implementations(op):
        if name not in ("auto", impl.name):
            continue
        reason = impl.supports(situation)
        if reason is None:
            return Choice(impl, tuple(refused))
        refused.append((impl.name, reason))
    known = ", ".join(impl.name for impl in implementations(op))
    reasons = "; ".join(f"{n}: {r}" for n, r in refused) or "no such implementation"
    raise KernelUnavailable(f"{op}={name} cannot run here ({reasons}). Known: {known}, auto")
