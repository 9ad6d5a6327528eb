"""Which implementation runs an operation: decided once, before the model is built, with reasons against the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine_kernels.measured import times


@dataclass(frozen=True, slots=True)
class Situation:
    """What an implementation needs to know to say whether it can run, and how fast it is."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int = 0
    length: int = 0
    """Positions of a row."""
    groups: int = 1
    """Query heads for each key/value head."""
    causal: bool = True
    dropout: bool = False
    """Attention weights are dropped."""
    documents: bool = False
    """Attention stays inside the documents of packed rows."""
    padded: bool = False
    """Rows end in padding that a query before it must not see."""
    window: bool = False
    """Attention sees a sliding window."""
    deterministic: bool = False
    """The same inputs give the same bits."""
    compiled: bool = False
    """What stands around it is compiled by torch.compile."""
    fp8: bool = False
    """Linear layers round their inputs to 8 bits, which torch.compile fuses with what makes them."""
    width: int = 0
    """Hidden size."""
    gathered: bool = False
    """Weights are whole only while the module that holds them runs, for the loss too."""
    update: str = "adamw"
    """The optimizer's rule, and where it runs if that is not where the model is."""
    flat: bool = True
    """Optimizer state is a few long tensors rather than one for each parameter."""


def _willing(situation: Situation) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Impl:
    """One implementation of `op`. `supports` returns None when it can run, otherwise the reason why not."""

    op: str
    name: str
    supports: Callable[[Situation], str | None]
    fn: Any
    """The function; a named tuple of them for an operation that has several; None: what calls it does without."""
    reluctant: Callable[[Situation], str | None] = _willing
    """Returns None, or the reason why `auto` takes it only where no other can run."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen implementation and what was said of the others."""

    impl: Impl
    refused: tuple[tuple[str, str], ...]
    """(name, reason) of each implementation that was passed over because it cannot run."""
    slower: tuple[tuple[str, str], ...] = ()
    """(name, reason) of each that can run and was passed over for a reason other than its place in the list."""

    @property
    def passed_over(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of all that were not taken, those that can run first."""
        return *self.slower, *self.refused

    @property
    def explained(self) -> str:
        """What was chosen, and why not the others."""
        return self.impl.name + "".join(f"; not {name}: {reason}" for name, reason in self.passed_over)

    def __str__(self) -> str:
        return f"{self.impl.op}: {self.explained}"


class KernelUnavailable(ValueError):
    """An implementation was asked for by name and cannot run here. The message holds the reason."""


_IMPLS: dict[str, list[Impl]] = {}


def register(impl: Impl) -> None:
    """Add an implementation. `auto` prefers what was registered first, where nothing was measured."""
    _IMPLS.setdefault(impl.op, []).append(impl)


def operations() -> list[str]:
    """All operations that have implementations."""
    return list(_IMPLS)


def implementations(op: str) -> list[Impl]:
    """All implementations of `op`, preferred first."""
    return list(_IMPLS.get(op, []))


def choose(op: str, name: str, situation: Situation) -> Choice:
    """The implementation called `name`, or for `auto` the fastest that can run.

    `auto` takes the one with the shortest time in the measurements that the package ships for this architecture, and
    the first registered where there are none; one that is reluctant only where no other can run.

    Raises:
        KernelUnavailable: `name` is unknown or cannot run here, or nothing can.
    """
    able, refused = [], []
    for impl in implementations(op):
        if name not in ("auto", impl.name):
            continue
        reason = impl.supports(situation)
        if reason is None:
            able.append(impl)
        else:
            refused.append((impl.name, reason))
    if not able:
        known = ", ".join(impl.name for impl in implementations(op))
        reasons = "; ".join(f"{n}: {r}" for n, r in refused) or "no such implementation"
        raise KernelUnavailable(f"{op}={name} cannot run here ({reasons}). Known: {known}, auto")
    measured = times(op, situation)
    reluctant = {impl.name: reason for impl in able if (reason := impl.reluctant(situation)) is not None}
    willing = [impl for impl in able if impl.name not in reluctant] or able
    best = min(willing, key=lambda impl: measured.us.get(impl.name, math.inf))
    fastest = measured.us.get(best.name)
    slower = []
    for impl in able:
        if impl is best:
            continue
        if impl.name in reluctant:
            slower.append((impl.name, reluctant[impl.name]))
        elif fastest is not None and impl.name in measured.us:
            slower.append((impl.name, f"{measured.us[impl.name] / fastest:.2f} times the time {measured.where}"))
        elif fastest is not None:
            slower.append((impl.name, "is not measured on this architecture"))
    return Choice(best, tuple(refused), tuple(slower))
