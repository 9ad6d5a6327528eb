"""Inputs of recomputed groups in host memory: the same bits, buffers that are used again, the order of the copies."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.dist.context import SINGLE
from engine.model.host_checkpoints import HostCheckpoints, _Saved
from engine.model.layers import build_stacks
from tests.helpers.models import LLAMA, MODELS, batch_of, feed_of, layers_of, loss_and_gradients, noisy_weights


@pytest.mark.parametrize("cfg", MODELS, ids=lambda c: c.name)
@pytest.mark.parametrize(("interval", "nested"), [(1, False), (2, True)])
def test_no_bit_of_loss_and_gradients_changes(cfg: ModelConfig, interval: int, nested: bool) -> None:
    cfg = replace(cfg, dropout=0.3, attention_dropout=0.2, num_layers=5)
    batch, layers, host = batch_of(cfg, 2, 8, padded=True), layers_of(cfg), HostCheckpoints()
    groups: dict[str, Any] = {"tp": SINGLE, "recompute": interval, "nested": nested}
    (plain,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), **groups)
    (other,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), **groups, host=host)
    loss, want = loss_and_gradients(cfg, plain.train(), batch)
    again, got = loss_and_gradients(cfg, other.train(), batch)
    assert torch.equal(again, loss)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name
    # Embedding output and outputs of groups but the last, (2, 8, 32) in fp32.
    assert host.buffer_bytes == -(-5 // interval) * 2 * 8 * 32 * 4


def test_buffers_serve_again_and_passes_without_a_backward_pass_give_theirs_back() -> None:
    layers, host, batch = layers_of(LLAMA), HostCheckpoints(), batch_of(LLAMA, 2, 8)
    (model,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE, recompute=1, host=host)
    loss_and_gradients(LLAMA, model.train(), batch)
    size = host.buffer_bytes
    for _ in range(3):
        loss_and_gradients(LLAMA, model, batch)
    model(None, feed_of(LLAMA, batch))
    gc.collect()
    assert host.buffer_bytes == size
    # Two passes in flight, as in a pipeline, take twice as much.
    both = [model(None, feed_of(LLAMA, batch)).sum() for _ in range(2)]
    for output in both:
        output.backward()
    assert host.buffer_bytes == 2 * size


def save(host: HostCheckpoints, values: list[float]) -> tuple[list[Tensor], list[weakref.ref[Tensor]]]:
    """Squares of leaves, whose factors are kept in host memory."""
    kept, outputs, seen = host.forward_pass(), [], []
    for value in values:
        x = torch.full((4,), value, requires_grad=True) * 1.0
        with kept():
            outputs.append(x.square().sum())
        seen.append(weakref.ref(x))
        del x
    return outputs, seen


def test_what_went_to_the_host_is_not_held_on_the_device() -> None:
    outputs, seen = save(HostCheckpoints(), [1.0, 2.0])
    assert [ref() for ref in seen] == [None, None]
    assert [float(out.detach()) for out in outputs] == [4.0, 16.0]


def test_copies_back_run_one_ahead_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fetch, take = _Saved.fetch, _Saved.take

    def watched_fetch(self: _Saved) -> None:
        if self._buffer is not None:
            order.append(f"fetch {self._buffer.shaped(self._shape, self._dtype)[0]:.0f}")
        fetch(self)

    def watched_take(self: _Saved) -> Tensor:
        found = take(self)
        order.append(f"use {found[0]:.0f}")
        return found

    monkeypatch.setattr(_Saved, "fetch", watched_fetch)
    monkeypatch.setattr(_Saved, "take", watched_take)
    outputs, _ = save(HostCheckpoints(), [1.0, 2.0, 3.0])
    for output in reversed(outputs):
        output.backward()
    assert order == ["fetch 3", "fetch 2", "use 3", "fetch 1", "use 2", "use 1"]


def test_a_second_backward_pass_is_refused() -> None:
    (output,), _ = save(HostCheckpoints(), [2.0])
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="serves one backward pass of each forward pass"):
        output.backward()
