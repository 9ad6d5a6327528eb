"""Collectives of split linear layers beside the layers' products; no gradients.

`none` does one after the other. `chunked` starts NCCL's collectives and meanwhile multiplies what is there already, or
what is sent next. `symmetric` lets copy engines move the parts through memory that the ranks map of each other (torch's
symmetric memory, without multicast), so that communication takes no multiprocessors from the products.
Shapes: B batch, S positions, L = S/t of them, t ranks on the axis, K columns in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.enums import TpOverlap
from engine.dist import collectives
from engine.dist.collectives import all_gather, packed, reduce_scatter
from engine.parallel import symmetric

Finish = Callable[[], Tensor]
"""Waits (on GPUs the stream does) and gives the result."""

ROWS_APART = 4
"""Up to so many sequences are sent one by one, straight to their place; more in one piece, which is copied there."""
HALF_ROWS = 1024
"""Rows that half of a product has at least where its two halves are summed over the ranks one after the other."""


def product(x_BMK: Tensor, matrix_KO: Tensor, bias_O: Tensor | None, out_BMO: Tensor) -> None:
    """x @ matrix + bias into `out`, which may be some positions of a larger tensor."""
    if len(x_BMK) == 1:
        if bias_O is None:
            torch.mm(x_BMK[0], matrix_KO, out=out_BMO[0])
        else:
            torch.addmm(bias_O, x_BMK[0], matrix_KO, out=out_BMO[0])
        return
    matrices = matrix_KO.expand(len(x_BMK), -1, -1)
    if bias_O is None:
        torch.bmm(x_BMK, matrices, out=out_BMO)
    else:
        torch.baddbmm(bias_O, x_BMK, matrices, out=out_BMO)


def start_gather(x_BLK: Tensor, group: str, overlap: str) -> Finish:
    """All positions, (B, S, K), from this rank's."""
    ranks, x_BLK = collectives.resolve(group), x_BLK.contiguous()
    batch, length, width = x_BLK.shape
    if overlap == TpOverlap.none:
        x_BSK = all_gather(x_BLK, ranks, dim=1)
        return lambda: x_BSK
    if overlap == TpOverlap.symmetric:
        arriving = symmetric.start_all_gather(x_BLK.flatten(0, 1), group)
        return lambda: _in_order(arriving(), batch, length)
    if batch > ROWS_APART:
        blocks = x_BLK.new_empty((ranks.size() * batch, length, width))
        work = dist.all_gather_into_tensor(blocks, x_BLK, group=ranks, async_op=True)
        return lambda: _in_order(_after([work], blocks), batch, length)
    whole = x_BLK.new_empty((batch, length * ranks.size(), width))
    pairs = zip(whole, x_BLK, strict=True)
    works = [dist.all_gather_into_tensor(row, mine, group=ranks, async_op=True) for row, mine in pairs]
    return lambda: _after(works, whole)


def start_reduce_scatter(x_BSK: Tensor, group: str, overlap: str) -> Finish:
    """This rank's positions, (B, L, K), of the sum of the ranks' `x`."""
    ranks, x_BSK = collectives.resolve(group), x_BSK.contiguous()
    batch, positions, width = x_BSK.shape
    length = positions // ranks.size()
    if overlap == TpOverlap.none:
        mine = reduce_scatter(x_BSK, ranks, dim=1)
        return lambda: mine
    if overlap == TpOverlap.chunked and batch <= ROWS_APART:
        parts = x_BSK.new_empty((batch, length, width))
        pairs = zip(parts, x_BSK, strict=True)
        works = [dist.reduce_scatter_tensor(part, row, group=ranks, async_op=True) for part, row in pairs]
        return lambda: _after(works, parts)
    blocks = packed(x_BSK.view(batch, ranks.size(), length, width).transpose(0, 1)).flatten(0, 1)
    if overlap == TpOverlap.symmetric:
        arriving = symmetric.start_reduce_scatter(blocks.flatten(0, 1), group)
        return lambda: arriving().view(batch, length, width)
    summed = x_BSK.new_empty((batch, length, width))
    work = dist.reduce_scatter_tensor(summed, blocks, group=ranks, async_op=True)
    return lambda: _after([work], summed)


def start_sum(x: Tensor, group: str, overlap: str) -> Finish:
    """The sum of the ranks' `x`, which it overwrites."""
    work = dist.all_reduce(x, group=collectives.resolve(group), async_op=overlap != TpOverlap.none)
    return lambda: x if work is None else _after([work], x)


def gather_product(
    x_BLK: Tensor, matrix_KO: Tensor, bias_O: Tensor | None, group: str, overlap: str, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """All positions' products, (B, S, O), from this rank's positions; with `keep` the gathered positions, (B, S, K)."""
    ranks, x_BLK = collectives.resolve(group), x_BLK.contiguous()
    batch, length, width = x_BLK.shape
    y_BSO = x_BLK.new_empty((batch, length * ranks.size(), matrix_KO.shape[1]))

    def multiply(part: Tensor, first: int) -> None:
        product(part, matrix_KO, bias_O, y_BSO[:, first : first + part.shape[1]])

    if overlap == TpOverlap.symmetric:
        rows = x_BLK.new_empty((ranks.size() * batch * length, width))
        symmetric.gather_and_consume(
            x_BLK.flatten(0, 1), lambda part, rank: multiply(part.view_as(x_BLK), rank * length), rows, group, keep
        )
        return y_BSO, _in_order(rows, batch, length) if keep else None
    finish = start_gather(x_BLK, group, overlap)
    if overlap == TpOverlap.none:
        x_BSK = finish()
        multiply(x_BSK, 0)
    else:
        own = ranks.rank() * length
        multiply(x_BLK, own)
        x_BSK = finish()
        for part, first in ((x_BSK[:, :own], 0), (x_BSK[:, own + length :], own + length)):
            if part.shape[1]:
                multiply(part, first)
    return y_BSO, x_BSK if keep else None


def product_scatter(x_BSK: Tensor, matrix_KO: Tensor, group: str, overlap: str) -> Tensor:
    """This rank's positions, (B, L, O), of the sum of the ranks' products."""
    ranks = collectives.resolve(group)
    me, count, width = ranks.rank(), ranks.size(), matrix_KO.shape[1]
    batch, length = x_BSK.shape[0], x_BSK.shape[1] // count
    if overlap == TpOverlap.none:
        y_BSO = x_BSK.new_empty((*x_BSK.shape[:2], width))
        product(x_BSK, matrix_KO, None, y_BSO)
        return reduce_scatter(y_BSO, ranks, dim=1)
    terms = x_BSK.new_empty((count, batch, length, width))

    def multiply(rank: int, out: Tensor) -> None:
        """What `rank` will hold of this rank's product."""
        product(x_BSK[:, rank * length : (rank + 1) * length], matrix_KO, None, out.view(batch, length, width))

    if overlap == TpOverlap.symmetric:
        symmetric.produce_and_exchange(multiply, terms.flatten(0, 2), group)
        return terms.sum(dim=0)
    works: list[Any] = []
    for step in range(1, count):
        to, source = (me + step) % count, (me - step) % count
        leaving = torch.empty_like(terms[0])
        multiply(to, leaving)
        send = dist.P2POp(dist.isend, leaving, group=ranks, group_peer=to)
        works += dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, terms[source], group=ranks, group_peer=source)])
    multiply(me, terms[me])
    return _after(works, terms).sum(dim=0)


def product_sum(x_BSK: Tensor, matrix_KO: Tensor, group: str, overlap: str) -> Tensor:
    """The sum of the ranks' products, (B, S, O)."""
    x_1MK = x_BSK.flatten(0, 1)[None]
    y_1MO = x_1MK.new_empty((1, x_1MK.shape[1], matrix_KO.shape[1]))
    half = -(-x_1MK.shape[1] // 2)
    rows = half if overlap != TpOverlap.none and half >= HALF_ROWS else x_1MK.shape[1]
    finishes = []
    for x, y in zip(x_1MK.split(rows, dim=1), y_1MO.split(rows, dim=1), strict=True):
        product(x, matrix_KO, None, y)
        finishes.append(start_sum(y, group, overlap))
    for finish in finishes:
        finish()
    return y_1MO.view(*x_BSK.shape[:2], -1)


def _after(works: list[Any], result: Tensor) -> Tensor:
    for work in works:
        work.wait()
    return result


def _in_order(rows: Tensor, batch: int, length: int) -> Tensor:
    """Blocks of B sequences' L positions, one from each rank, in any shape of the same order -> (B, S, K)."""
    blocks = rows.view(-1, batch, length, rows.shape[-1])
    return packed(blocks.transpose(0, 1)).flatten(1, 2)
