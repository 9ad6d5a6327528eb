"""What an optimizer remembers, as pieces of logical tensors: the same in every layout, for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config.enums import OptimizerName
from engine.config.schema import OptimConfig
from engine.optim.adafactor import Adafactor
from engine.optim.pieces import Piece

WEIGHT = "weight"
"""Kind of the fp32 master weights."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_KINDS = {
    OptimizerName.adamw: _MOMENTS,
    OptimizerName.lamb: _MOMENTS,
    OptimizerName.lion: ("exp_avg",),
    OptimizerName.adafactor: (),
}
_UNCOUNTED = (OptimizerName.sgd, OptimizerName.lion)


def kinds_of(optim: OptimConfig) -> set[str]:
    """Every kind of state of a run with these options: those of its slots on all ranks together."""
    if optim.name is OptimizerName.sgd:
        return {WEIGHT, "momentum_buffer"} if optim.momentum else {WEIGHT}
    if optim.name is OptimizerName.muon:
        return {WEIGHT, "momentum_buffer", *_MOMENTS}
    if optim.name is OptimizerName.adafactor:
        return {WEIGHT, "row_mean", "column_mean", "square"}
    return {WEIGHT, *_KINDS[optim.name]}


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of one kind of state, and the memory that holds it."""

    kind: str
    """`weight`, or the name under which the optimizer keeps it: `exp_avg`, ..."""
    piece: Piece
    values: Tensor
    """fp32, (piece.size,), contiguous; live memory: to be read and written between two steps."""
    shared: bool
    """Whether all ranks of `ctx.reduce` hold the same."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that an optimizer steps, with its parameter group and what it holds."""

    optimizer: torch.optim.Optimizer
    name: OptimizerName
    group: dict[str, Any]
    tensor: Tensor
    pieces: Sequence[Piece]
    sharded: bool
    """Whether the ranks of `ctx.reduce` hold different pieces."""

    def slots(self) -> Iterator[Slot]:
        """The weights, and the optimizer's state, which is made of zeros where no step has made it yet."""
        yield from self._slots(WEIGHT, self.tensor)
        state: dict[str, Any] = self.optimizer.state[self.tensor]
        for kind in self._kinds():
            if state.get(kind) is None:
                state[kind] = torch.zeros_like(self.tensor)
            yield from self._slots(kind, state[kind])
        if "step" not in state:
            self.count(0)
        if isinstance(self.optimizer, Adafactor):
            for kind, piece, values, shared in self.optimizer.moments(self.tensor, self.pieces):
                yield Slot(kind, piece, values, shared or not self.sharded)

    def _slots(self, kind: str, flat: Tensor) -> Iterator[Slot]:
        for piece in self.pieces:
            if piece.size:
                yield Slot(kind, piece, piece.of(flat.detach()), not self.sharded)

    def _kinds(self) -> tuple[str, ...]:
        """Kinds of state that are laid out like the tensor."""
        if self.name is OptimizerName.sgd:
            return ("momentum_buffer",) if self.group.get("momentum") else ()
        if self.name is OptimizerName.muon:
            return ("momentum_buffer",) if self.group["orthogonal"] else _MOMENTS
        return _KINDS[self.name]

    @property
    def steps(self) -> int:
        """Steps that the optimizer has counted for the tensor, which corrections for bias need; 0: none, or it
        does not count.
        """
        return int(self.optimizer.state[self.tensor].get("step", 0))

    def count(self, steps: int) -> None:
        """Let the optimizer go on counting from `steps`."""
        if self.name in _UNCOUNTED or (self.name is OptimizerName.muon and self.group["orthogonal"]):
            return
        state = self.optimizer.state[self.tensor]
        if isinstance(self.optimizer, torch.optim.AdamW):
            # As torch makes it: beside the parameter where a fused kernel reads it.
            device = self.tensor.device if self.group["fused"] else torch.device("cpu")
            state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=device)
        else:
            state["step"] = steps
