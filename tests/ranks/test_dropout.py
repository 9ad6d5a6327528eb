"""Dropout in a cut block: the residual stream loses what one rank drops, attention heads lose weights of their own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import ModelConfig
from engine.dist.context import ParallelContext
from engine.model import block
from engine.model.batch import Batch
from engine.model.feed import make_feed
from engine.topology.grid import Grid
from engine_kernels.ops import AttentionDropout, Kernels, dropout
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

P, ROWS, LENGTH, SITE = 0.3, 4, 32, 1
MODEL = ModelConfig(
    name="wide",
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    vocab_size=64,
    max_positions=LENGTH,
    dropout=P,
    attention_dropout=P,
)


def masks(sequence: bool) -> tuple[list[Tensor], Tensor]:
    """What this rank's block kept: of its two sublayers' outputs, (B, L, D) each, and of its heads, (B, N, S, S)."""
    tp = dist.get_world_size()
    ctx = ParallelContext.create(Grid(tp=tp), torch.device("cpu"))
    residual, heads = [], []

    def residual_spy(x: Tensor, keys: Tensor, p: float, salt: int = 0) -> Tensor:
        residual.append(dropout(torch.ones_like(x), keys, p, salt) != 0)
        return dropout(x, keys, p, salt)

    def attention_spy(q: Tensor, k: Tensor, v: Tensor, *, dropout: AttentionDropout, **rest: object) -> Tensor:
        heads.append(kept_weights(dropout))
        return q

    kernels = Kernels(attention=attention_spy)
    wiring = block.Wiring(
        tp=ctx.tp, cp=ctx.cp, sequence=sequence, kernels=kernels, rotary=None, recompute_attention=False
    )
    module = block.Block(MODEL, wiring)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    batch = Batch(tokens_BS=tokens, labels_BS=tokens, samples_B=torch.arange(10, 10 + ROWS))
    one = torch.tensor(1.0)
    feed = make_feed(batch, (one, one), ctx, sequence=sequence, seed=1234)
    own = LENGTH // tp if sequence else LENGTH
    block.dropout = residual_spy  # type: ignore[assignment]
    block.run_block(MODEL, wiring, SITE, module, torch.ones(ROWS, own, MODEL.hidden_size), feed)
    return residual, heads[0]


def kept_weights(how: AttentionDropout) -> Tensor:
    keys_BNS = how.keys()
    return dropout(torch.ones(*keys_BNS.shape, keys_BNS.shape[-1]), keys_BNS, how.p) != 0


def independent(a: Tensor, b: Tensor) -> bool:
    """Agreements are binomial; a good hash is more than five standard deviations off once in 1.7e6 tests."""
    chance = P**2 + (1 - P) ** 2
    spread = math.sqrt(a.numel() * chance * (1 - chance))
    return abs(int((a == b).sum()) - a.numel() * chance) < 5 * spread


@pytest.mark.parametrize("sequence", [False, True])
def test_two_ranks_drop_what_one_drops(sequence: bool) -> None:
    ((whole, whole_heads),) = run_ranks(masks, 1, (False,))
    cut = run_ranks(masks, 2, (sequence,))
    assert len(whole) == 2
    for i, expected in enumerate(whole):
        parts = [residual[i] for residual, _ in cut]
        if sequence:
            assert torch.equal(torch.cat(parts, dim=1), expected)
        else:
            assert all(torch.equal(part, expected) for part in parts)
    first, second = (heads for _, heads in cut)
    assert first.shape == (ROWS, 2, LENGTH, LENGTH)
    assert torch.equal(torch.cat([first, second], dim=1), whole_heads)
    assert independent(first, second)
    assert independent(whole[0], whole[1]), "the two sublayers"
    assert independent(whole_heads[:, 0], whole[0]), "weights and the residual stream"
    assert not independent(first, first)
