from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.config import Activation, ModelConfig
from engine.config.enums import Recompute
from engine.dist.context import SINGLE
from engine.model.batch import Batch
from engine.model.layers import build_stacks
from engine.parallel.logical import logical_of
from engine_kernels import ops  # noqa: F401  (registers the implementations)
from engine_kernels.registry import implementations
from tests.helpers.models import (
    FLAVOURS,
    GPT2,
    LLAMA,
    MODELS,
    batch_of,
    feed_of,
    layers_of,
    logits_of,
    loss_and_gradients,
    noisy_weights,
    tokens_of,
    whole_model,
)

by_name = pytest.mark.parametrize("cfg", FLAVOURS, ids=lambda c: c.name)
any_model = pytest.mark.parametrize("cfg", MODELS, ids=lambda c: c.name)


def of_tokens(tokens_BS: Tensor) -> Batch:
    return Batch(tokens_BS=tokens_BS, labels_BS=tokens_BS, samples_B=torch.arange(tokens_BS.shape[0]))


@by_name
@pytest.mark.parametrize("length", [1, 7, 24])
def test_tokens_go_in_and_logits_over_the_padded_vocabulary_come_out(cfg: ModelConfig, length: int) -> None:
    logits = whole_model(cfg)(None, feed_of(cfg, batch_of(cfg, 3, length)))
    assert logits.shape == (3, length, 128)
    assert logits.dtype is torch.float32
    assert torch.isfinite(logits).all()


@any_model
def test_every_layer_but_the_heads_keeps_the_residual_stream(cfg: ModelConfig) -> None:
    model, feed = whole_model(cfg), feed_of(cfg, batch_of(cfg, 2, 5))
    x = None
    for layer, module in zip(model.layers, model.parts, strict=True):
        if layer.name.startswith("head"):
            break
        x = layer.run(module, x, feed)
        assert x.shape == (2, 5, cfg.hidden_size), layer.name


@by_name
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_a_later_token_does_not_change_earlier_logits(cfg: ModelConfig, attention: str) -> None:
    (impl,) = (one for one in implementations("attention") if one.name == attention)
    layers = layers_of(cfg, attention=impl.fn)
    (model,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE)
    tokens = tokens_of(cfg, 1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % cfg.vocab_size
    before, after = (model(None, feed_of(cfg, of_tokens(x))) for x in (tokens, changed))
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-5)
    per_position = (after - before).abs().amax(dim=(0, 2))
    assert (per_position[7:] > 1e-3).all(), "every later position looks back at the changed token"


@any_model
def test_positions_matter(cfg: ModelConfig) -> None:
    logits = logits_of(whole_model(cfg), feed_of(cfg, of_tokens(torch.tensor([[4, 9, 9, 4, 9]])))).detach()
    assert float((logits[0, 1] - logits[0, 2]).abs().max()) > 1e-2


@any_model
def test_dropout_acts_in_training_and_is_off_in_eval(cfg: ModelConfig) -> None:
    batch = batch_of(cfg, 2, 8)
    plain = logits_of(whole_model(cfg), feed_of(cfg, batch))
    for dropping in (replace(cfg, dropout=0.5), replace(cfg, attention_dropout=0.5)):
        model, feed = whole_model(dropping), feed_of(dropping, batch)
        assert torch.equal(logits_of(model, feed), plain)
        model.train()
        first = logits_of(model, feed)
        assert not torch.equal(first, plain)
        assert torch.equal(logits_of(model, feed), first), "a mask is a function of the sample"
        later = feed_of(dropping, replace(batch, samples_B=batch.samples_B + 2))
        assert not torch.equal(logits_of(model, later), first), "other samples have other masks"
        seeded = feed_of(dropping, batch, train__seed=99)
        assert not torch.equal(logits_of(model, seeded), first), "other seeds have other masks"


@any_model
@pytest.mark.parametrize(
    ("recompute", "interval"), [(Recompute.selective, 1), (Recompute.full, 1), (Recompute.full, 2), (Recompute.full, 9)]
)
def test_recomputation_changes_no_bit_of_loss_and_gradients(
    cfg: ModelConfig, recompute: Recompute, interval: int
) -> None:
    cfg = replace(cfg, dropout=0.3, attention_dropout=0.2)
    batch = batch_of(cfg, 2, 8, padded=True)
    loss, grads = loss_and_gradients(cfg, whole_model(cfg).train(), batch)
    layers = layers_of(cfg, train__recompute=recompute)
    groups = interval if recompute is Recompute.full else 0
    (model,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE, recompute=groups)
    again, found = loss_and_gradients(cfg, model.train(), batch)
    assert torch.equal(again, loss)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        assert torch.equal(found[name], grad), name


def test_dropout_of_the_embeddings_alone_drops_half_and_scales_the_rest() -> None:
    cfg = replace(LLAMA, dropout=0.5, max_positions=400)
    layer = layers_of(cfg)[0]
    module = layer.factory()
    with torch.no_grad():
        module.weight.fill_(1.0)
    feed = feed_of(cfg, of_tokens(torch.zeros(1, 400, dtype=torch.int64)))
    dropped = layer.run(module, None, feed)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    # Standard error of the share over 12,800 draws is 0.4 %.
    assert float((dropped == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert set(layer.run(module.eval(), None, feed).unique().tolist()) == {1.0}


def test_sites_and_sublayers_drop_different_elements() -> None:
    cfg = replace(GPT2, dropout=0.5)
    feed = feed_of(cfg, batch_of(cfg, 2, 8))
    keys = [feed.keys_BL(site) for site in range(3)]
    assert all(not torch.equal(a, b) for a, b in zip(keys, keys[1:], strict=False))
    drops = [feed.attention_dropout(0.5, site, first, 2) for site, first in ((1, 0), (2, 0), (1, 2))]
    assert len({drop.seed for drop in drops}) == 3
    assert all(not torch.equal(drops[0].keys(), other.keys()) for other in drops[1:])


def test_attention_keys_of_a_head_do_not_depend_on_the_cut() -> None:
    feed = feed_of(GPT2, batch_of(GPT2, 2, 8))
    whole = feed.attention_dropout(0.5, 1, 0, 4).keys()
    parts = [feed.attention_dropout(0.5, 1, first, 2).keys() for first in (0, 2)]
    assert whole.shape == (2, 4, 8)
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("activation", [Activation.gelu, Activation.gelu_tanh])
def test_gelu_and_its_tanh_form_differ_a_little(activation: Activation) -> None:
    mlp = layers_of(replace(GPT2, activation=activation))[2].factory().mlp
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.zero_()
        mlp.up.bias.fill_(-1.0)
        mlp.down.weight[0, 0] = 1.0
    value = float(mlp(torch.zeros(1, 1, 32))[0, 0, 0].detach())
    # -1 * Phi(-1), and Hendrycks and Gimpel's tanh form of it (arXiv 1606.08415).
    assert value == pytest.approx(-0.1586553 if activation is Activation.gelu else -0.1588080, abs=1e-6)


@any_model
def test_padding_of_the_vocabulary_reaches_neither_loss_nor_gradients(cfg: ModelConfig) -> None:
    narrow, batch = replace(cfg, vocab_multiple=1), batch_of(cfg, 2, 8)
    loss, grads = loss_and_gradients(narrow, whole_model(narrow), batch)
    padded = whole_model(cfg)
    for parameter in padded.parameters():
        if logical_of(parameter).padded is not None:
            # Padding rows hold zero in a run; large values here would show in the loss.
            parameter.data[cfg.vocab_size :] = 30.0
    padded_loss, padded_grads = loss_and_gradients(cfg, padded, batch)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        own = padded_grads[name]
        torch.testing.assert_close(own[: grad.shape[0]], grad, rtol=1e-4, atol=1e-5, msg=name)
        assert not own[grad.shape[0] :].any(), name


@any_model
def test_padding_rows_start_at_zero_so_their_logits_are_zero(cfg: ModelConfig) -> None:
    assert not logits_of(whole_model(cfg), feed_of(cfg, batch_of(cfg, 1, 5)))[..., cfg.vocab_size :].any()
