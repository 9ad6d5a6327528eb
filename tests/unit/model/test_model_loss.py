"""Losses as shares of the global batch's mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import ModelConfig
from engine.config.enums import SentenceHead
from engine.dist.context import ParallelContext
from engine.model.batch import IGNORE, Batch
from engine.model.build import build_loss
from engine.runtime.steps import make_feeds
from tests.helpers.models import BERT, GPT2, MODELS, batch_of, config_of, feed_of, whole_model

ONE = ParallelContext.single()


def shares(cfg: ModelConfig, batches: list[Batch]) -> list[Tensor]:
    """The share of each micro-batch of a step."""
    config, model = config_of(cfg), whole_model(cfg)
    loss = build_loss(config, ONE)
    return [loss(model(None, feed), feed).detach() for feed in make_feeds(batches, config, ONE)]


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary() -> None:
    feed = feed_of(GPT2, batch_of(GPT2, 2, 3))
    loss = build_loss(config_of(GPT2), ONE)(torch.zeros(2, 3, 128), feed)
    assert float(loss) == pytest.approx(float(torch.tensor(101.0).log()), rel=1e-6)


@pytest.mark.parametrize("cfg", MODELS, ids=lambda c: c.name)
def test_every_target_weighs_the_same_in_whatever_micro_batch(cfg: ModelConfig) -> None:
    whole = batch_of(cfg, 4, 10, padded=True)

    def rows(first: int, last: int) -> Batch:
        fields = {name: getattr(whole, name) for name in Batch.__slots__}
        return Batch(**{name: None if value is None else value[first:last] for name, value in fields.items()})

    (together,) = shares(cfg, [whole])
    found = shares(cfg, [rows(0, 1), rows(1, 4)])
    assert found[0] != found[1]
    torch.testing.assert_close(torch.stack(found).sum(), together, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cfg", MODELS, ids=lambda c: c.name)
def test_rows_without_targets_have_no_part(cfg: ModelConfig) -> None:
    full, empty = batch_of(cfg, 2, 8), batch_of(cfg, 2, 8, first=2)
    sentence = None if empty.sentence_B is None else torch.full((2,), IGNORE)
    empty = replace(empty, labels_BS=torch.full((2, 8), IGNORE), sentence_B=sentence)
    (alone,) = shares(cfg, [full])
    first, second = shares(cfg, [full, empty])
    assert (first, second) == (alone, 0.0)
    assert shares(cfg, [empty]) == [0.0]


def test_the_sentence_loss_is_added_as_a_mean_over_samples() -> None:
    batch = batch_of(BERT, 3, 8)
    model, feed = whole_model(BERT), feed_of(BERT, batch)
    logits, classes = model(None, feed)
    without = build_loss(config_of(replace(BERT, sentence_head=SentenceHead.none)), ONE)((logits, None), feed)
    both = build_loss(config_of(BERT), ONE)((logits, classes), feed)
    assert batch.sentence_B is not None
    torch.testing.assert_close(both - without, F.cross_entropy(classes, batch.sentence_B), rtol=1e-5, atol=1e-6)


def test_smoothing_and_z_loss_come_from_the_options() -> None:
    feed = feed_of(GPT2, batch_of(GPT2, 2, 6))
    logits = whole_model(GPT2)(None, feed).detach()
    options = {"train__label_smoothing": 0.1, "train__z_loss": 1e-2}
    z = logits[..., : GPT2.vocab_size].flatten(0, 1)
    for name in options:
        found = build_loss(config_of(GPT2, **{name: options[name]}), ONE)(logits, feed)
        smoothing = options[name] if name == "train__label_smoothing" else 0.0
        expected = F.cross_entropy(z, feed.labels_BS.flatten(), label_smoothing=smoothing)
        if name == "train__z_loss":
            expected = expected + options[name] * z.logsumexp(-1).square().mean()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
