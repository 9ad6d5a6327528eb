"""Position-wise computations tile by tile, each computed again in the backward pass: what is inside them exists for one
tile of the positions at a time (ALST, arXiv 2506.13996, section 3.1).

Shapes: B batch, L positions of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Part = Callable[..., tuple[Tensor, ...]]
"""Tensors (B, positions, ...) in and out, of which each position is computed from the same one of the arguments."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Equal runs of the L positions, as far as that is possible."""

    length: int
    count: int

    def __iter__(self) -> Iterator[slice]:
        edges = [self.length * i // self.count for i in range(self.count + 1)]
        return (slice(start, end) for start, end in zip(edges, edges[1:], strict=False))

    def runs(self, x: Tensor, tile: slice) -> Tensor:
        """A view (B, runs, positions of the tile, ...) of `x`, which holds one run of L positions or several."""
        return x.unflatten(1, (-1, self.length))[:, :, tile]

    def cut(self, x: Tensor | None, tile: slice) -> Tensor | None:
        """(B, positions, ...), the tile of each run one after the other."""
        return None if x is None else self.runs(x, tile).flatten(1, 2)

    def put(self, whole: Tensor | None, part: Tensor, tile: slice) -> Tensor:
        """Write a tile where `cut` would have read it; into a new tensor if there is none yet."""
        if whole is None:
            positions = part.shape[1] * self.length // (tile.stop - tile.start)
            whole = part.new_empty((part.shape[0], positions, *part.shape[2:]))
        self.runs(whole, tile).copy_(part.unflatten(1, (-1, tile.stop - tile.start)))
        return whole


class _Keep(torch.autograd.Function):
    """Keeps tensors for a backward pass before the forward pass runs.

    Where a checkpoint around it computes again, it ends once it has these, without the tiles' forward pass.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty((0,))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise AssertionError("nothing is computed from it")


class _Tiled(torch.autograd.Function):
    """Gradients of parameters are added up over the tiles in fp32 at least, and rounded once to the parameters' dtype.

    Sums in bf16 would drop what a tile adds to the sum of two hundred others.
    """

    @staticmethod
    def forward(
        ctx: Any, part: Part, tiles: _Tiles, kept: list[Tensor], arguments: int, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.part, ctx.tiles, ctx.kept = part, tiles, kept
        # Not saved: they stay where they are, and ZeRO-3 gathers them again before the backward pass.
        ctx.parameters = inputs[arguments:]
        whole: list[Tensor | None] = []
        for tile in tiles:
            found = part(*(tiles.cut(x, tile) for x in inputs[:arguments]))
            whole = [tiles.put(*pair, tile) for pair in zip(whole or [None] * len(found), found, strict=True)]
        return tuple(x for x in whole if x is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tiles: _Tiles = ctx.tiles
        arguments: tuple[Tensor | None, ...] = ctx.kept[0].grad_fn.saved_tensors
        ctx.kept.clear()
        wants = ctx.needs_input_grad[4:]
        own = wants[: len(arguments)]
        parameters = [p for p, want in zip(ctx.parameters, wants[len(arguments) :], strict=True) if want]
        sums: list[Tensor] = []
        whole: list[Tensor | None] = [None] * len(arguments)
        for tile in tiles:
            pieces = [tiles.cut(x, tile) for x in arguments]
            pieces = [x if x is None else x.detach().requires_grad_(want) for x, want in zip(pieces, own, strict=True)]
            with torch.enable_grad():
                found = ctx.part(*pieces)
            sought = [x for x, want in zip(pieces, own, strict=True) if x is not None and want]
            gradients = torch.autograd.grad(
                found, [*sought, *parameters], [tiles.runs(g, tile).flatten(1, 2) for g in grads]
            )
            inner = iter(gradients)
            whole = [tiles.put(x, next(inner), tile) if want else x for x, want in zip(whole, own, strict=True)]
            sums = _added(sums, list(inner))
        given = iter([total.to(p.dtype) for total, p in zip(sums, parameters, strict=True)])
        return None, None, None, None, *whole, *(next(given) if want else None for want in wants[len(arguments) :])


def _added(sums: list[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    if not sums:
        # Copies: a gradient may be a view of something that others read.
        return [g.to(torch.promote_types(g.dtype, torch.float32), copy=True) for g in gradients]
    return [total.add_(g) for total, g in zip(sums, gradients, strict=True)]


def tiled(part: Part, arguments: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], *, tile: int) -> Any:
    """`part(*arguments)`, computed for at most `tile` of the L positions at a time.

    Args:
        arguments: the first is the residual stream, (B, L, ...). Others have its positions, or several runs of L
            positions, which are cut alike; None is handed on.
        parameters: those that `part` uses.
        tile: positions, at least one.

    Returns:
        What `part` returns: tensors of as many runs of L positions as it makes of one.
    """
    stream = arguments[0]
    assert stream is not None
    tiles = _Tiles(stream.shape[1], -(-stream.shape[1] // tile))
    kept: list[Tensor] = []
    if torch.is_grad_enabled():
        # The output, as torch 2.11 frees what its node holds when nobody has it; in a list, so that it is no input.
        kept.append(_Keep.apply(torch.empty((0,), requires_grad=True), *arguments))
    return _Tiled.apply(part, tiles, kept, len(arguments), *arguments, *parameters)
