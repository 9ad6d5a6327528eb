"""One micro-batch as the layers of one rank read it.

Shapes: B rows, S positions that this context-parallel rank holds, L of them in its residual stream (S, or S/t with
sequence parallelism). Sequences are cut into runs of equal length, in rank order: first over cp, then over tp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.dist.context import AxisGroup, ParallelContext
from engine.dist.rng import stream_seed
from engine.model.batch import IGNORE, Batch, Documents
from engine_kernels.ops import AttentionDropout, attention_keys, row_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Inputs, targets and what dropout masks are functions of."""

    tokens_BS: Tensor
    labels_BS: Tensor
    types_BL: Tensor | None
    """Segments of the positions of the residual stream."""
    positions_L: Tensor
    """Positions in the whole sequence of the residual stream's, int64."""
    lengths_B: Tensor | None
    """Positions of the whole sequence before its padding."""
    documents: Documents | None
    """Of the whole sequences."""
    document_positions_BS: Tensor | None
    """Positions of the whole sequence in their documents, int64."""
    sentence_B: Tensor | None
    samples_B: Tensor
    first_sample: int
    whole_length: int
    """Positions of the whole sequence."""
    targets: Tensor
    """Targets in the global batch of this step, fp32 scalar."""
    sentences: Tensor
    """Rows with a sentence class in the global batch, fp32 scalar."""
    seed: int

    @property
    def embedded_positions(self) -> Tensor:
        """Positions of the residual stream's that the model sees: (L,), or (B, L) when they restart in a row."""
        if self.document_positions_BS is None:
            return self.positions_L
        return self.document_positions_BS[:, self.positions_L]

    def keys_BL(self, site: int) -> Tensor:
        """Dropout keys of the residual stream's elements at `site`, int32; see `engine_kernels.ops.dropout`."""
        return row_keys(self.seed, site, self.samples_B, self.positions_L)

    def attention_dropout(self, p: float, site: int, first_head: int, heads: int) -> AttentionDropout:
        """Dropout of the attention weights of `heads` logical heads from `first_head` on, over the whole sequence."""

        # Out of compiled graphs: torch 2.13 compiles the hashes of heads wrongly for CPUs, and `site` may be a symbol,
        # whose 64-bit arithmetic only Python gets right.
        @torch.compiler.disable
        def keys_BNS() -> Tensor:
            positions_S = torch.arange(self.whole_length, device=self.samples_B.device)
            return attention_keys(row_keys(self.seed, site, self.samples_B, positions_S), first_head, heads)

        # A fused kernel has one seed for all its elements: another one for each layer, micro-batch and group of heads.
        seed = stream_seed(self.seed, "attention", site, self.first_sample, first_head)
        return AttentionDropout(p=p, seed=seed, keys=keys_BNS)


def make_feed(batch: Batch, counts: tuple[Tensor, Tensor], ctx: ParallelContext, *, sequence: bool, seed: int) -> Feed:
    """This rank's part of `batch`, on its device.

    Args:
        batch: the micro-batch of this replica; its length is a multiple of cp, with `sequence` of cp * tp.
        counts: targets and sentence classes of the global batch, see `count_targets`.
        sequence: the residual stream is cut over tp as well.
        seed: of dropout.
    """
    rows, length = batch.tokens_BS.shape
    first_sample = int(batch.samples_B[0])
    if batch.documents is not None:
        end = int(batch.documents.starts[-1])
        assert end == rows * length, f"documents end at {end} of {rows * length} positions"
    batch = batch.to(ctx.device)
    documents = batch.documents
    start, stop = _run(0, length, ctx.cp)
    stream = _run(start, stop - start, ctx.tp) if sequence else (start, stop)
    types = batch.token_types_BS
    return Feed(
        tokens_BS=batch.tokens_BS[:, start:stop],
        labels_BS=batch.labels_BS[:, start:stop],
        types_BL=None if types is None else types[:, stream[0] : stream[1]],
        positions_L=torch.arange(*stream, device=ctx.device),
        lengths_B=batch.lengths_B,
        documents=documents,
        document_positions_BS=None if documents is None else documents.positions(rows, length),
        sentence_B=batch.sentence_B,
        samples_B=batch.samples_B,
        first_sample=first_sample,
        whole_length=length,
        targets=counts[0],
        sentences=counts[1],
        seed=seed,
    )


def _run(start: int, length: int, axis: AxisGroup) -> tuple[int, int]:
    """First and last position (exclusive) of this rank's equal share of a run."""
    share = length // axis.size
    assert share * axis.size == length, f"{length} positions over {axis.size} ranks"
    return start + share * axis.rank, start + share * (axis.rank + 1)


def count_targets(batches: Iterable[Batch], ctx: ParallelContext) -> tuple[Tensor, Tensor]:
    """Targets and sentence classes of the global batch: fp32 scalars on the device. Collective over all ranks.

    Losses are divided by these, so that every target weighs the same wherever it is; at least 1, so that a global batch
    without targets has the loss 0.
    """
    counts = [0, 0]
    for batch in batches:
        counts[0] += _count(batch.labels_BS)
        if batch.sentence_B is not None:
            counts[1] += _count(batch.sentence_B)
    # Written by the device itself: a copy would wait until it has done all before, and leave it idle then.
    found = torch.stack([torch.full((), count, dtype=torch.float64, device=ctx.device) for count in counts])
    if ctx.dp.group is not None:
        # Of stages some see no targets. Without stages all ranks of a replica count alike, and they do it together:
        # new weights may still travel by the group of the replicas.
        staged = ctx.pp.size > 1
        dist.all_reduce(found, group=ctx.dp.group if staged else None)
        if not staged:
            found /= dist.get_world_size() // ctx.dp.size
    targets, sentences = found.clamp(min=1.0).float()
    return targets, sentences


def _count(labels: Tensor) -> int:
    # Not torch's sum: from 32,768 elements on it wakes threads of the host, and for milliseconds the device waits.
    return int(np.count_nonzero(labels.numpy() != IGNORE))
