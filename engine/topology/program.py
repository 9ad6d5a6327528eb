"""What the stages of a pipeline do, as data: operations on micro-batches and on parts of the model.

A chunk is a part of the model that one stage runs at once; chunks are numbered along the model, so chunk 0 holds the
embeddings and the last one the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OpKind(StrEnum):
    """What a stage does. Sends never wait for the receiver."""

    recv_activation = "recv_activation"
    forward = "forward"
    send_activation = "send_activation"
    recv_grad = "recv_grad"
    backward = "backward"
    send_grad = "send_grad"


COMPUTE = (OpKind.forward, OpKind.backward)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. `chunk` is the one that computes: a receive is for it, a send is what it made."""

    kind: OpKind
    micro_batch: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Program:
    """One step of a pipeline.

    A receive stands right before the pass that uses it and a send right after the pass that made it; between chunks of
    the same stage nothing is sent. For each source stage, destination stage and kind (activation or gradient) the
    messages are received in the order in which they were sent, so a receive may be posted early without naming it.
    """

    stages: int
    micro_batches: int
    owner: tuple[int, ...]
    """Chunk -> its stage."""
    ops: tuple[tuple[Op, ...], ...]
    """Stage -> its operations in order."""

    @property
    def chunks(self) -> int:
        """Parts of the model on all stages together."""
        return len(self.owner)

    def chunks_of(self, stage: int) -> tuple[int, ...]:
        """Chunks on `stage`, in the order of the model."""
        return tuple(chunk for chunk, owner in enumerate(self.owner) if owner == stage)

    def peer(self, op: Op) -> int:
        """The stage at the other end of a receive or send. Raises `ValueError` for a forward or backward pass."""
        if op.kind in COMPUTE:
            raise ValueError(f"{op} has no peer")
        upstream = op.kind in (OpKind.recv_activation, OpKind.send_grad)
        return self.owner[op.chunk - 1 if upstream else op.chunk + 1]
