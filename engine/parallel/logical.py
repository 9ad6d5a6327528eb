"""The logical identity of a parameter: a layout-free name and shape, and the rule that says who holds which slice.

A rank holds a `Parameter` whose attribute `logical` is a `LogicalTensor`. Initial weights, parity, weight files and
statistics speak of logical tensors only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from engine.dist.rng import stream_seed

Role = Literal["", "matrix", "embedding", "head", "vector"]
"""What optimizers and muP tell apart: matrices between hidden layers, tables looked up (also when they are the tied
output projection), output projections, and norms and biases."""

_PIECE = 1 << 20
"""Elements that one generator draws."""


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """What a parameter is, whatever the layout.

    `dim` None: every tensor-parallel rank holds the whole tensor. Otherwise the tensor is cut along `dim`: each of its
    `segments` (sizes along `dim`; one segment by default) is cut into equal parts and a rank holds its part of each.
    A fused query-key-value weight has three segments. `padded` is the size along `dim` once padding rows are added.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[int, ...] = ()
    padded: int | None = None
    init_std: float | None = None
    """Standard deviation of a normal draw; None: `init_value` everywhere."""
    init_value: float = 0.0
    name: str = ""
    decay: bool = True
    """Whether weight decay applies: matrices and embeddings, not norms and biases."""
    role: Role = ""
    """When not given, "vector" for one dim and "matrix" for more."""

    def __post_init__(self) -> None:
        if not self.role:
            object.__setattr__(self, "role", "vector" if len(self.shape) < 2 else "matrix")

    def local_slice(self, full: Tensor, rank: int, size: int) -> Tensor:
        """The part of `full` (shape `shape`) that tensor-parallel rank `rank` of `size` holds; padding is zero."""
        if self.dim is None:
            return full
        if self.padded is not None and self.padded > full.shape[self.dim]:
            missing = list(full.shape)
            missing[self.dim] = self.padded - full.shape[self.dim]
            full = torch.cat([full, full.new_zeros(missing)], dim=self.dim)
        segments = self.segments or (full.shape[self.dim],)
        parts = [s.chunk(size, dim=self.dim)[rank] for s in full.split(segments, dim=self.dim)]
        return torch.cat(parts, dim=self.dim) if len(parts) > 1 else parts[0]

    def assemble(self, locals_: Sequence[Tensor]) -> Tensor:
        """The logical tensor from the slices of all tensor-parallel ranks, in rank order; padding is cut off."""
        if self.dim is None:
            return locals_[0]
        size = len(locals_)
        total = self.padded or self.shape[self.dim]
        segments = [s // size for s in (self.segments or (total,))]
        pieces = [local.split(segments, dim=self.dim) for local in locals_]
        full = torch.cat([pieces[r][i] for i in range(len(segments)) for r in range(size)], dim=self.dim)
        return full.narrow(self.dim, 0, self.shape[self.dim])

    def draw(self, seed: int) -> Tensor:
        """The initial value, fp32 on the CPU, of shape `shape`: a function of `seed` and `name` alone."""
        if self.init_std is None:
            return torch.full(self.shape, self.init_value)
        value = torch.empty(self.shape)
        pieces = value.view(-1).split(_PIECE)
        seeds = [stream_seed(seed, "init", self.name, *([index] if index else [])) for index in range(len(pieces))]
        fill = partial(_fill, std=self.init_std)
        # A generator gives its numbers one after the other: a minute and more for billions of parameters.
        with ThreadPoolExecutor(min(len(pieces), torch.get_num_threads())) as pool:
            deque(pool.map(fill, pieces, seeds), maxlen=0)
        return value


def _fill(piece: Tensor, seed: int, std: float) -> None:
    piece.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))


def logical_of(parameter: nn.Parameter) -> LogicalTensor:
    """The logical tensor that `parameter` is a slice of."""
    logical: LogicalTensor = parameter.logical  # type: ignore[attr-defined]
    return logical


def make_parameter(local_shape: Sequence[int], logical: LogicalTensor) -> nn.Parameter:
    """An uninitialised fp32 parameter of `local_shape` that knows its logical tensor."""
    parameter = nn.Parameter(torch.empty(*local_shape))
    parameter.logical = logical  # type: ignore[attr-defined]
    return parameter


def replicated_parameter(shape: Sequence[int], *, init_value: float) -> nn.Parameter:
    """A constant, undecayed parameter (norm weight or bias) that every tensor-parallel rank holds whole."""
    return make_parameter(shape, LogicalTensor(shape=tuple(shape), init_value=init_value, decay=False))


def name_parameters(prefix: str, module: nn.Module) -> Iterator[nn.Parameter]:
    """Give each parameter of `module` its logical name `<prefix>.<path>` and yield it."""
    for path, parameter in module.named_parameters():
        parameter.logical = replace(logical_of(parameter), name=f"{prefix}.{path}")  # type: ignore[attr-defined]
        yield parameter
