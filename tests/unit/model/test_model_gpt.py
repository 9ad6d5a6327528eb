from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.config import Activation, ModelConfig
from engine.dist.context import SINGLE, AxisGroup, ParallelContext
from engine.model.gpt import NextTokenLoss, build_layers
from engine.model.layers import WholeModel
from engine.parallel.logical import logical_of
from engine_kernels import ops  # noqa: F401  (registers the implementations)
from engine_kernels.registry import implementations
from tests.helpers.models import FLAVOURS, GPT2, LLAMA, layers_of, noisy_weights, tokens_of, whole_model
from tests.helpers.threads import context_of, on_tp_ranks

by_name = pytest.mark.parametrize("cfg", FLAVOURS, ids=lambda c: c.name)


@by_name
@pytest.mark.parametrize("length", [1, 7, 24])
def test_tokens_go_in_and_logits_over_the_padded_vocabulary_come_out(cfg: ModelConfig, length: int) -> None:
    logits = whole_model(cfg)(tokens_of(cfg, 3, length))
    assert logits.shape == (3, length, 128)
    assert logits.dtype is torch.float32
    assert torch.isfinite(logits).all()


@by_name
def test_each_layer_keeps_the_residual_stream(cfg: ModelConfig) -> None:
    x = tokens_of(cfg, 2, 5)
    model = whole_model(cfg)
    for index, run in model.steps[:-1]:
        assert run is None
        x = model.modules_[index](x)
        assert x.shape == (2, 5, cfg.hidden_size)


@by_name
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_a_later_token_does_not_change_earlier_logits(cfg: ModelConfig, attention: str) -> None:
    (impl,) = (one for one in implementations("attention") if one.name == attention)
    layers = build_layers(cfg, ParallelContext.single(), impl.fn)
    model = WholeModel(layers, noisy_weights(), tp=SINGLE)
    tokens = tokens_of(cfg, 1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % cfg.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-5)
    per_position = (after - before).abs().amax(dim=(0, 2))
    assert (per_position[7:] > 1e-3).all(), "every later position looks back at the changed token"


def test_positions_matter() -> None:
    for cfg in FLAVOURS:
        tokens = torch.tensor([[4, 9, 9, 4, 9]])
        logits = whole_model(cfg)(tokens).detach()
        assert float((logits[0, 1] - logits[0, 2]).abs().max()) > 1e-2, cfg.name


@by_name
def test_dropout_acts_in_training_and_is_off_in_eval(cfg: ModelConfig) -> None:
    tokens = tokens_of(cfg, 2, 8)
    plain = whole_model(cfg)(tokens)
    for dropping in (replace(cfg, dropout=0.5), replace(cfg, attention_dropout=0.5)):
        model = whole_model(dropping)
        assert torch.equal(model(tokens), plain)
        model.train()
        torch.manual_seed(0)
        first, second = model(tokens), model(tokens)
        assert not torch.equal(first, plain)
        assert not torch.equal(first, second)


def test_dropout_of_the_embeddings_alone_drops_half_and_scales_the_rest() -> None:
    embedding = layers_of(replace(LLAMA, dropout=0.5))[0].factory()
    with torch.no_grad():
        embedding.weight.fill_(1.0)
    tokens = torch.zeros(1, 10_000 // LLAMA.hidden_size + 1, dtype=torch.int64)
    dropped = embedding(tokens)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    # Standard error of the share over 1e4 draws is 0.5 %.
    assert float((dropped == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert set(embedding.eval()(tokens).unique().tolist()) == {1.0}


def test_blocks_drop_different_attention_weights() -> None:
    """One stream for all blocks; with one each, all would start from the same state."""
    cfg = replace(GPT2, attention_dropout=0.5)
    first, second = (layer.factory().train() for layer in layers_of(cfg) if layer.name in ("block.0", "block.1"))
    drawn = []
    for block in (first, second):
        with block.attention.rng.fork(torch.device("cpu")):
            drawn.append(torch.rand(64))
    assert not torch.equal(*drawn)


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


def loss_and_gradients(model: WholeModel, cfg: ModelConfig) -> tuple[Tensor, dict[str, Tensor]]:
    rows = tokens_of(cfg, 2, 9)
    loss = NextTokenLoss(cfg, ParallelContext.single())(model(rows[:, :-1]), rows[:, 1:])
    loss.backward()
    return loss.detach(), {logical_of(p).name: p.grad for p in model.parameters() if p.grad is not None}


@by_name
def test_padding_of_the_vocabulary_reaches_neither_loss_nor_gradients(cfg: ModelConfig) -> None:
    loss, grads = loss_and_gradients(whole_model(replace(cfg, vocab_multiple=1)), cfg)
    padded = whole_model(cfg)
    for parameter in padded.parameters():
        if logical_of(parameter).padded is not None:
            # Padding rows hold zero in a run; large values here would show in the loss.
            parameter.data[cfg.vocab_size :] = 30.0
    padded_loss, padded_grads = loss_and_gradients(padded, cfg)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        own = padded_grads[name]
        torch.testing.assert_close(own[: grad.shape[0]], grad, rtol=1e-4, atol=1e-6, msg=name)
        assert not own[grad.shape[0] :].any(), name


@by_name
def test_padding_rows_start_at_zero_so_their_logits_are_zero(cfg: ModelConfig) -> None:
    assert not whole_model(cfg)(tokens_of(cfg, 1, 5))[..., cfg.vocab_size :].any()


@by_name
def test_loss_is_the_mean_over_tokens_in_nats(cfg: ModelConfig) -> None:
    uniform = torch.zeros(2, 3, 128)
    loss = NextTokenLoss(cfg, ParallelContext.single())(uniform, torch.zeros(2, 3, dtype=torch.int64))
    assert float(loss) == pytest.approx(float(torch.tensor(101.0).log()), rel=1e-6)


@by_name
def test_cut_over_two_ranks_it_has_the_loss_and_gradients_of_one(cfg: ModelConfig) -> None:
    rows = tokens_of(cfg, 2, 9)
    loss, grads = loss_and_gradients(whole_model(cfg), cfg)

    def rank(tp: AxisGroup) -> tuple[Tensor, list]:
        ctx = context_of(tp)
        model = whole_model(cfg, ctx)
        mine = NextTokenLoss(cfg, ctx)(model(rows[:, :-1]), rows[:, 1:])
        mine.backward()
        return mine.detach(), [(logical_of(p), p.grad) for p in model.parameters()]

    (first, parameters), (second, others) = on_tp_ranks(rank, 2)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, loss, rtol=1e-6, atol=0)
    assert len(parameters) == len(grads)
    for (logical, own), (_, other) in zip(parameters, others, strict=True):
        if logical.dim is None:
            torch.testing.assert_close(own, other, rtol=0, atol=0, msg=logical.name)
        expected = grads[logical.name][: logical.shape[0]]
        scale = float(expected.abs().max()) + 1e-3
        torch.testing.assert_close(
            logical.assemble([own, other])[: logical.shape[0]], expected, rtol=0, atol=1e-5 * scale, msg=logical.name
        )
