"""What sets an encoder apart: it looks both ways, but not at padding; segments; the sentence head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config.enums import SentenceHead
from engine.dist.context import SINGLE
from engine.model.layers import build_stacks
from engine_kernels import ops  # noqa: F401  (registers the implementations)
from engine_kernels.registry import implementations
from tests.helpers.models import BERT, batch_of, feed_of, layers_of, noisy_weights, whole_model


def test_an_earlier_token_sees_a_later_one() -> None:
    batch = batch_of(BERT, 1, 8)
    changed = batch.tokens_BS.clone()
    changed[0, 6] = (changed[0, 6] + 1) % BERT.vocab_size
    model = whole_model(BERT)
    before, after = (model(None, feed_of(BERT, replace(batch, tokens_BS=x)))[0] for x in (batch.tokens_BS, changed))
    assert ((after - before).abs().amax(dim=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_nobody_sees_padding(attention: str) -> None:
    (impl,) = (one for one in implementations("attention") if one.name == attention)
    layers = layers_of(BERT, attention=impl.fn)
    (model,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE)
    batch = batch_of(BERT, 3, 10, padded=True)
    assert batch.lengths_B is not None
    padding_BS = torch.arange(10) >= batch.lengths_B[:, None]
    changed = batch.tokens_BS.masked_fill(padding_BS, 5)
    assert not torch.equal(changed, batch.tokens_BS)
    (before, classes), (after, others) = (
        model(None, feed_of(BERT, replace(batch, tokens_BS=x))) for x in (batch.tokens_BS, changed)
    )
    torch.testing.assert_close(after[~padding_BS], before[~padding_BS], rtol=0, atol=1e-5)
    torch.testing.assert_close(others, classes, rtol=0, atol=1e-5)


def test_segments_matter_and_none_means_all_in_the_first() -> None:
    batch, model = batch_of(BERT, 2, 8), whole_model(BERT)
    assert batch.token_types_BS is not None
    plain, zeros, given = (
        model(None, feed_of(BERT, replace(batch, token_types_BS=types)))[0]
        for types in (None, torch.zeros_like(batch.token_types_BS), batch.token_types_BS)
    )
    assert torch.equal(plain, zeros)
    assert not torch.allclose(given, plain, atol=1e-2)


def test_classes_come_from_the_first_token() -> None:
    batch, model = batch_of(BERT, 2, 8), whole_model(BERT)
    _, classes = model(None, feed_of(BERT, batch))
    assert classes.shape == (2, 2)
    transform = model.parts[-3]
    x = torch.randn(2, 5, BERT.hidden_size, generator=torch.Generator().manual_seed(0))
    moved = x.clone()
    moved[:, 1:] += 1.0
    assert torch.equal(transform(x)[1], transform(moved)[1])
    moved[:, 0] += 1.0
    assert not torch.equal(transform(x)[1], transform(moved)[1])


def test_without_a_sentence_head_there_are_no_classes() -> None:
    cfg = replace(BERT, sentence_head=SentenceHead.none, token_types=0)
    logits, classes = whole_model(cfg)(None, feed_of(cfg, batch_of(cfg, 2, 8)))
    assert classes is None
    assert logits.shape == (2, 8, 128)


def test_the_heads_share_a_stage() -> None:
    assert [layer.name for layer in layers_of(BERT) if layer.glued] == ["head", "head.bias"]
