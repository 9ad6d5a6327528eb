"""Collectives of split linear layers beside the layers' products; no gradients.

`none` does one after the other. `chunked` starts NCCL's collectives and meanwhile multiplies what is there already, or
what is sent next. `symmetric` lets copy engines move the parts through memory that the ranks map of each other (torch's
symmetric memory, without multicast), so that communication takes no multiprocessors from the products.
Shapes: M rows (positions of any sequences) of one rank, t ranks on the axis, R = t M rows of all in rank order, K
columns in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config.enums import TpOverlap
from engine.dist import collectives
from engine.dist.collectives import all_gather, reduce_scatter
from engine.parallel import symmetric

Finish = Callable[[], Tensor]
"""Waits (on GPUs the stream does) and gives the result."""

HALF_ROWS = 1024
"""Rows that half of a product has at least where its two halves are summed over the ranks one after the other."""


def _product(x_MK: Tensor, matrix_KO: Tensor, bias_O: Tensor | None, out_MO: Tensor) -> None:
    """x @ matrix + bias into `out`, which may be some rows of a larger tensor."""
    if bias_O is None:
        torch.mm(x_MK, matrix_KO, out=out_MO)
    else:
        torch.addmm(bias_O, x_MK, matrix_KO, out=out_MO)


def start_gather(x_MK: Tensor, group: str, overlap: str) -> Finish:
    """The rows of all ranks, (R, K), from this rank's."""
    ranks, x_MK = collectives.resolve(group), x_MK.contiguous()
    if overlap == TpOverlap.symmetric:
        return symmetric.start_all_gather(x_MK, group)
    if overlap == TpOverlap.none:
        x_RK = all_gather(x_MK, ranks, dim=0)
        return lambda: x_RK
    arriving = x_MK.new_empty((ranks.size() * len(x_MK), x_MK.shape[1]))
    work = dist.all_gather_into_tensor(arriving, x_MK, group=ranks, async_op=True)
    return lambda: _after([work], arriving)


def start_reduce_scatter(x_RK: Tensor, group: str, overlap: str) -> Finish:
    """This rank's rows, (M, K), of the sum of the ranks' `x`."""
    ranks, x_RK = collectives.resolve(group), x_RK.contiguous()
    if overlap == TpOverlap.symmetric:
        return symmetric.start_reduce_scatter(x_RK, group)
    if overlap == TpOverlap.none:
        mine = reduce_scatter(x_RK, ranks, dim=0)
        return lambda: mine
    summed = x_RK.new_empty((len(x_RK) // ranks.size(), x_RK.shape[1]))
    work = dist.reduce_scatter_tensor(summed, x_RK, group=ranks, async_op=True)
    return lambda: _after([work], summed)


def start_sum(x: Tensor, group: str, overlap: str) -> Finish:
    """The sum of the ranks' `x`, which it overwrites."""
    work = dist.all_reduce(x, group=collectives.resolve(group), async_op=overlap != TpOverlap.none)
    return lambda: x if work is None else _after([work], x)


def gather_product(
    x_MK: Tensor, matrix_KO: Tensor, bias_O: Tensor | None, group: str, overlap: str, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Products of all ranks' rows, (R, O), from this rank's rows; with `keep` the gathered rows, (R, K)."""
    ranks, x_MK = collectives.resolve(group), x_MK.contiguous()
    rows = len(x_MK)
    y_RO = x_MK.new_empty((ranks.size() * rows, matrix_KO.shape[1]))

    def multiply(part: Tensor, first: int) -> None:
        _product(part, matrix_KO, bias_O, y_RO[first : first + len(part)])

    if overlap == TpOverlap.symmetric:
        x_RK = x_MK.new_empty((ranks.size() * rows, x_MK.shape[1]))
        symmetric.gather_and_consume(x_MK, lambda part, rank: multiply(part, rank * rows), x_RK, group, keep)
        return y_RO, x_RK if keep else None
    finish = start_gather(x_MK, group, overlap)
    if overlap == TpOverlap.none:
        x_RK = finish()
        multiply(x_RK, 0)
    else:
        own = ranks.rank() * rows
        multiply(x_MK, own)
        x_RK = finish()
        for part, first in ((x_RK[:own], 0), (x_RK[own + rows :], own + rows)):
            if len(part):
                multiply(part, first)
    return y_RO, x_RK if keep else None


def product_scatter(x_RK: Tensor, matrix_KO: Tensor, group: str, overlap: str) -> Tensor:
    """This rank's rows, (M, O), of the sum of the ranks' products."""
    ranks = collectives.resolve(group)
    me, count, width = ranks.rank(), ranks.size(), matrix_KO.shape[1]
    if overlap == TpOverlap.none:
        return reduce_scatter(x_RK @ matrix_KO, ranks, dim=0)
    terms = x_RK.new_empty((count, len(x_RK) // count, width))

    def multiply(rank: int, out: Tensor) -> None:
        """What `rank` will hold of this rank's product."""
        _product(x_RK.chunk(count)[rank], matrix_KO, None, out)

    if overlap == TpOverlap.symmetric:
        symmetric.produce_and_exchange(multiply, terms.flatten(0, 1), group)
        return _sum_of(terms)
    works: list[Any] = []
    for step in range(1, count):
        to, source = (me + step) % count, (me - step) % count
        leaving = torch.empty_like(terms[0])
        multiply(to, leaving)
        send = dist.P2POp(dist.isend, leaving, group=ranks, group_peer=to)
        works += dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, terms[source], group=ranks, group_peer=source)])
    multiply(me, terms[me])
    return _sum_of(_after(works, terms))


def product_sum(x_MK: Tensor, matrix_KO: Tensor, group: str, overlap: str) -> Tensor:
    """The sum of the ranks' products, (M, O), of rows that all ranks have."""
    y_MO = x_MK.new_empty((len(x_MK), matrix_KO.shape[1]))
    half = -(-len(x_MK) // 2)
    rows = half if overlap != TpOverlap.none and half >= HALF_ROWS else len(x_MK)
    finishes = []
    for x, y in zip(x_MK.split(rows), y_MO.split(rows), strict=True):
        _product(x, matrix_KO, None, y)
        finishes.append(start_sum(y, group, overlap))
    for finish in finishes:
        finish()
    return y_MO


def _sum_of(terms: Tensor) -> Tensor:
    """(t, M, K) -> (M, K), rounded once. Two are added, which torch does in a third of its time for sums."""
    return terms[0] + terms[1] if len(terms) == 2 else terms.sum(dim=0)


def _after(works: list[Any], result: Tensor) -> Tensor:
    for work in works:
        work.wait()
    return result
