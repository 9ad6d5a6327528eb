"""What the training loop and the studies know of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.dist.context import ParallelContext
from engine.model.batch import Batch
from engine.optim.state import Slot
from engine.parallel.logical import LogicalTensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step. Tensors are scalars on the device, so that reading them is the caller's choice of time."""

    loss: Tensor
    """Mean loss over the targets of the global batch, before the step, nats per target; equal on all ranks."""
    grad_norm: Tensor
    """Global L2 norm of the averaged gradients before clipping; equal on all ranks."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """What one rank must remember to go on as if it had never stopped."""

    slots: Sequence[Slot]
    """Master weights and optimizer state; memory to read from and to write into. On the ranks that share a tensor, in
    the same order."""
    numbers: dict[str, float]
    """Counters and the loss scale; equal on all ranks."""


class Engine(Protocol):
    """One rank's share of a training job. All methods are collective."""

    ctx: ParallelContext
    on_gradients: Callable[[], None] | None
    """Called once per step when gradients are averaged and not yet clipped; `gradients` may be read there."""

    def train_step(self, batches: Iterable[Batch], lr: float) -> StepResult:
        """Run this replica's micro-batches and one optimizer step at learning rate `lr`."""

    def eval_step(self, batches: Iterable[Batch]) -> Tensor:
        """Mean loss of a global batch without touching the weights; scalar, equal on all ranks."""

    def gradients(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """This tensor-parallel rank's slice of each gradient, fp32, whole over dp. To be read inside `on_gradients`."""

    def parameters(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """This tensor-parallel rank's slice of each parameter of its stage, fp32 master, whole over dp."""

    def state(self) -> EngineState:
        """The state between two steps. Made of zeros where no step has made it yet. Not collective."""

    def adopt_state(self, numbers: Mapping[str, float]) -> None:
        """Go on from what was written into the slots of `state`, and from its `numbers`."""
