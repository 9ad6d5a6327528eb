"""An engine that is nothing but its state: for what saves and loads, without DeepSpeed or a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from engine.checkpoint.reader import Reader
from engine.config import CheckpointConfig
from engine.dist.context import ParallelContext
from engine.optim.pieces import Piece
from engine.optim.state import Slot
from engine.parallel.logical import LogicalTensor
from engine.protocols import Engine, EngineState

KINDS = ("weight", "exp_avg")
SHAPES = {"table": (7, 3), "norm": (5,), "scale": ()}
_SHARED = ("norm", "scale")


def value_of(kind: str, name: str, draw: int) -> Tensor:
    """A whole logical tensor of draw number `draw`."""
    generator = torch.Generator().manual_seed(1000 * draw + 10 * list(SHAPES).index(name) + KINDS.index(kind))
    return torch.randn(SHAPES[name], generator=generator)


def facts(step: int, draw: int, **more: Any) -> dict[str, Any]:
    """Of a checkpoint that holds the tensors of `draw`."""
    return {"step": step, "samples": 8 * step, "draw": draw, **more}


@dataclass
class Slotted:
    """The table is shared out over `ctx.reduce` as ZeRO does, in stretches of elements; all ranks hold the rest."""

    ctx: ParallelContext
    numbers: dict[str, float] = field(default_factory=lambda: {"optimizer_steps": 0.0})
    slots: list[Slot] = field(default_factory=list)

    def fill(self, draw: int) -> Slotted:
        """Take the values of `draw`."""
        self.slots = list(self._made(draw))
        self.numbers = {"optimizer_steps": float(draw)}
        return self

    def _made(self, draw: int) -> Iterator[Slot]:
        ranks, rank = self.ctx.reduce.size, self.ctx.reduce.rank
        for kind in KINDS:
            for name, shape in SHAPES.items():
                whole = value_of(kind, name, draw).view(-1)
                count = whole.numel()
                shared = ranks == 1 or name in _SHARED
                start, end = (0, count) if shared else (count * rank // ranks, count * (rank + 1) // ranks)
                piece = Piece(
                    logical=LogicalTensor(shape=shape, name=name),
                    local_shape=shape,
                    start=start,
                    offset=0,
                    size=end - start,
                )
                yield Slot(kind, piece, whole[start:end].clone(), shared)

    def state(self) -> EngineState:
        """See `Engine.state`."""
        return EngineState(slots=self.slots, numbers=dict(self.numbers))

    def adopt_state(self, numbers: Mapping[str, float]) -> None:
        """See `Engine.adopt_state`."""
        self.numbers = dict(numbers)

    def digest(self) -> str:
        """A hash of all that a load could change."""
        found = hashlib.sha256(repr(sorted(self.numbers.items())).encode())
        for slot in self.slots:
            found.update(slot.values.numpy().tobytes())
        return found.hexdigest()

    @property
    def engine(self) -> Engine:
        """As the code under test sees it."""
        return cast(Engine, self)


def kept(**changes: int) -> CheckpointConfig:
    """Retention without a best checkpoint."""
    return CheckpointConfig(**({"keep_last": 2, "keep_best": 0} | changes))


def require_draw(reader: Reader) -> int:
    """Compare every byte and every tensor with what the manifest says was drawn; returns the number of the draw."""
    reader.verify()
    draw = int(reader.manifest.facts["draw"])
    for kind in KINDS:
        for name in SHAPES:
            assert torch.equal(reader.tensor(kind, name), value_of(kind, name, draw)), (reader.folder, kind, name)
    assert reader.manifest.facts["numbers"] == {"optimizer_steps": float(draw)}
    return draw


def names_in(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())
