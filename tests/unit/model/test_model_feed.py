"""What a rank reads of a micro-batch, and what losses are divided by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.dist.context import SINGLE, AxisGroup, ParallelContext
from engine.model.batch import IGNORE, Batch, Documents
from engine.model.feed import Feed, count_targets, make_feed
from engine_kernels.ops import AttentionDropout
from tests.helpers.models import BERT, GPT2, batch_of
from tests.helpers.threads import context_of, on_axis

COUNTS = (torch.tensor(3.0), torch.tensor(2.0))
B, S = 2, 24


def axis(rank: int, size: int) -> AxisGroup:
    return AxisGroup(rank=rank, size=size, ranks=tuple(range(size)), group=None)


def cut(batch: Batch, *, cp: AxisGroup = SINGLE, tp: AxisGroup = SINGLE, sequence: bool = False) -> Feed:
    ctx = replace(context_of(), cp=cp, tp=tp)
    return make_feed(batch, COUNTS, ctx, sequence=sequence, seed=5)


def test_one_rank_reads_everything() -> None:
    batch = batch_of(BERT, B, S, first=6, padded=True)
    feed = cut(batch)
    assert torch.equal(feed.tokens_BS, batch.tokens_BS)
    assert torch.equal(feed.labels_BS, batch.labels_BS)
    assert feed.types_BL is not None
    assert batch.token_types_BS is not None
    assert torch.equal(feed.types_BL, batch.token_types_BS)
    assert feed.positions_L.tolist() == list(range(S))
    assert (feed.first_sample, feed.whole_length) == (6, S)
    assert (feed.targets, feed.sentences) == COUNTS


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("context", "tensor"), [(1, 2), (2, 1), (2, 2), (3, 4)])
def test_sequences_are_cut_over_context_first_and_the_residual_stream_over_tp_inside(
    context: int, tensor: int, sequence: bool
) -> None:
    batch = batch_of(BERT, B, S, padded=True)
    assert batch.token_types_BS is not None
    width = S // context
    for c in range(context):
        for t in range(tensor):
            feed = cut(batch, cp=axis(c, context), tp=axis(t, tensor), sequence=sequence)
            held = slice(c * width, (c + 1) * width)
            assert torch.equal(feed.tokens_BS, batch.tokens_BS[:, held])
            assert torch.equal(feed.labels_BS, batch.labels_BS[:, held])
            stream = width // tensor if sequence else width
            first = c * width + (t * stream if sequence else 0)
            assert feed.positions_L.tolist() == list(range(first, first + stream))
            assert feed.types_BL is not None
            assert torch.equal(feed.types_BL, batch.token_types_BS[:, first : first + stream])
            assert feed.whole_length == S
            assert torch.equal(feed.lengths_B, batch.lengths_B), "attention sees the whole sequence"


def test_dropout_keys_of_all_ranks_are_those_of_one() -> None:
    batch = batch_of(GPT2, B, S)
    whole = cut(batch).keys_BL(2)
    parts = [cut(batch, cp=axis(c, 2), tp=axis(t, 3), sequence=True).keys_BL(2) for c in range(2) for t in range(3)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_targets_and_sentences_are_counted_over_micro_batches() -> None:
    first, second = batch_of(BERT, 2, 8), batch_of(BERT, 2, 6, first=2, padded=True)
    second = replace(second, sentence_B=torch.tensor([1, IGNORE]))
    targets, sentences = count_targets([first, second], ParallelContext.single())
    expected = sum(int((batch.labels_BS != IGNORE).sum()) for batch in (first, second))
    assert 0 < expected < 2 * 8 + 2 * 6
    assert (float(targets), float(sentences)) == (expected, 3.0)
    assert targets.dtype is torch.float32


def test_targets_are_counted_over_replicas() -> None:
    batches = [batch_of(GPT2, 2, 8, first=2 * r, padded=True) for r in range(2)]
    batches[1] = replace(batches[1], labels_BS=torch.full((2, 8), IGNORE))

    def rank(dp: AxisGroup) -> float:
        ctx = replace(ParallelContext.single(), dp=dp)
        return float(count_targets([batches[dp.rank]], ctx)[0])

    assert on_axis(rank, 2) == [14.0, 14.0]


@pytest.mark.parametrize("pp", [1, 2])
def test_targets_are_counted_once_whoever_sees_them(pp: int) -> None:
    """Two ranks for each of two replicas: both see its targets, or they are stages of which one does."""
    batch = batch_of(GPT2, 2, 8, padded=True)
    blank = replace(batch, labels_BS=torch.full((2, 8), IGNORE))

    def rank(everyone: AxisGroup) -> float:
        ctx = replace(ParallelContext.single(), dp=replace(everyone, size=2), pp=replace(everyone, size=pp))
        return float(count_targets([blank if pp > 1 and everyone.rank % 2 else batch], ctx)[0])

    assert on_axis(rank, 4) == [2 * 14.0] * 4


def test_a_global_batch_without_targets_divides_by_one() -> None:
    batch = replace(batch_of(GPT2, 2, 8), labels_BS=torch.full((2, 8), IGNORE))
    assert [float(count) for count in count_targets([batch], ParallelContext.single())] == [1.0, 1.0]


def test_a_batch_moves_as_a_whole() -> None:
    documents = Documents(torch.tensor([0, 8, 16], dtype=torch.int32), 8)
    batch = replace(batch_of(BERT, 2, 8, padded=True), documents=documents).to(torch.device("meta"))
    assert tuple(batch.tokens_BS.shape) == (2, 8)
    assert batch.documents is not None
    assert batch.documents.starts.device.type == "meta"
    for field in set(Batch.__slots__) - {"documents"}:
        assert getattr(batch, field).device.type == "meta", field
    assert batch_of(GPT2).to(torch.device("meta")).lengths_B is None


@pytest.mark.slow
def test_keys_of_attention_are_the_same_in_compiled_blocks() -> None:
    """Blocks share their code, so that the second one's site is a symbol to the compiler."""
    feed = cut(batch_of(GPT2, B, S))

    @torch.compile
    def block(x: Tensor, drop: AttentionDropout) -> Tensor:
        return x.int() + drop.keys()

    for site in (1, 2, 3):
        drop = feed.attention_dropout(0.1, site, 1, 4)
        keys = drop.keys()
        assert keys[:, 0].ne(keys[:, 1]).any()
        assert torch.equal(block(torch.zeros(keys.shape), drop), keys)
