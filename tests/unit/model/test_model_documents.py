"""Documents that share a row are trained on as if each stood alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from engine.config import ModelConfig, Positions
from engine.config.enums import Recompute
from engine.dist.context import SINGLE, AxisGroup, ParallelContext
from engine.model.batch import Batch, Documents
from engine.model.block import Block
from engine.model.feed import make_feed
from engine.model.gpt import LearnedPositions
from engine.model.layers import build_stacks
from engine.model.rope import RotaryTable
from engine.runtime.reference import ReferenceEngine
from engine_kernels.ops import AttentionFn, Kernels, sdpa_attention
from engine_kernels.reference.attention import attention as reference
from engine_kernels.reference.rotary import rotate_qk
from tests.helpers.models import (
    GPT2,
    LLAMA,
    NEOX,
    config_of,
    feed_of,
    layers_of,
    loss_and_gradients,
    noisy_weights,
    whole_model,
)
from tests.helpers.packed import documents_alone, packed_batch

LENGTHS = [[7, 1, 16], [3, 12, 5]]
PADDING = [0, 4]
by_name = pytest.mark.parametrize("cfg", [GPT2, LLAMA, NEOX], ids=lambda c: c.name)
MODELS = [
    NEOX,
    *(
        replace(
            base, name=f"{base.name} {positions} {'tied' if tied else 'untied'}", positions=positions, tied_head=tied
        )
        for base in (GPT2, LLAMA)
        for positions in Positions
        for tied in (True, False)
    ),
]


def step(cfg: ModelConfig, attention: AttentionFn, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and raw gradients of the oracle for one step over `batches`."""
    engine = ReferenceEngine(
        layers_of(cfg, attention=attention), noisy_weights(), config_of(cfg), ParallelContext.single()
    )
    found: dict[str, Tensor] = {}
    engine.on_gradients = lambda: found.update({tensor.name: grad.clone() for tensor, grad in engine.gradients()})
    loss = float(engine.train_step(batches, 0.0).loss)
    return loss, found


@pytest.mark.parametrize("attention", [reference, sdpa_attention], ids=["reference", "sdpa"])
@pytest.mark.parametrize("cfg", MODELS, ids=lambda c: c.name)
def test_gradients_are_the_sum_over_the_documents_alone(cfg: ModelConfig, attention: AttentionFn) -> None:
    packed = packed_batch(cfg, LENGTHS, padding=PADDING)
    loss, found = step(cfg, attention, [packed])
    expected_loss, expected = step(cfg, attention, documents_alone(packed))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert float(grad.norm()) > 0, name
        assert float((found[name] - grad).double().norm()) <= 1e-5 * float(grad.double().norm()), name
    _, seeing = step(cfg, attention, [replace(packed, documents=None)])
    assert all(float((seeing[name] - grad).norm()) > 1e-2 * float(grad.norm()) for name, grad in expected.items())


@by_name
def test_a_document_changes_nothing_of_another(cfg: ModelConfig) -> None:
    model = whole_model(cfg)
    packed = packed_batch(cfg, LENGTHS, padding=PADDING)
    changed = packed.tokens_BS.clone()
    changed[1, 3:15] = (changed[1, 3:15] + 1) % cfg.vocab_size
    before, after = (model(None, feed_of(cfg, batch)) for batch in (packed, replace(packed, tokens_BS=changed)))
    moved_BS = (after - before).abs().amax(dim=-1) > 1e-6
    expected_BS = torch.zeros_like(moved_BS)
    expected_BS[1, 3:15] = True
    assert torch.equal(moved_BS, expected_BS)


@by_name
@pytest.mark.parametrize(
    ("recompute", "interval"), [(Recompute.selective, 0), (Recompute.full, 1), (Recompute.full, 2)]
)
def test_recomputation_changes_no_bit(cfg: ModelConfig, recompute: Recompute, interval: int) -> None:
    cfg = replace(cfg, dropout=0.3, attention_dropout=0.2)
    packed = packed_batch(cfg, LENGTHS, padding=PADDING)
    loss, grads = loss_and_gradients(cfg, whole_model(cfg).train(), packed)
    layers = layers_of(cfg, train__recompute=recompute)
    (model,) = build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE, recompute=interval)
    again, found = loss_and_gradients(cfg, model.train(), packed)
    assert torch.equal(again, loss)
    assert all(torch.equal(found[name], grad) for name, grad in grads.items())


def test_dropout_masks_are_functions_of_the_place_in_the_row() -> None:
    packed = packed_batch(GPT2, LENGTHS, padding=PADDING)
    feed, plain = (feed_of(GPT2, batch) for batch in (packed, replace(packed, documents=None)))
    assert torch.equal(feed.keys_BL(1), plain.keys_BL(1))
    keys = [one.attention_dropout(0.5, 1, 0, 4).keys() for one in (feed, plain)]
    assert torch.equal(*keys)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 4)])
def test_positions_restart_with_each_document_on_every_rank(context: int, tensor: int, sequence: bool) -> None:
    batch = packed_batch(GPT2, LENGTHS, padding=PADDING)
    expected = torch.tensor([[*range(7), 0, *range(16)], [*range(3), *range(12), *range(5), *range(4)]])
    counts = (torch.tensor(1.0), torch.tensor(1.0))
    parts = []
    for c in range(context):
        for t in range(tensor if sequence else 1):
            cp, tp = (
                AxisGroup(rank=r, size=n, ranks=tuple(range(n)), group=None) for r, n in ((c, context), (t, tensor))
            )
            ctx = replace(ParallelContext.single(), cp=cp, tp=tp)
            feed = make_feed(batch, counts, ctx, sequence=sequence, seed=5)
            assert feed.document_positions_BS is not None
            assert torch.equal(feed.document_positions_BS, expected), "attention has the whole sequence"
            parts.append(feed.embedded_positions)
    assert torch.equal(torch.cat(parts, dim=1), expected)


def test_without_documents_positions_are_one_row() -> None:
    feed = feed_of(GPT2, replace(packed_batch(GPT2, LENGTHS, padding=PADDING), documents=None))
    assert feed.documents is feed.document_positions_BS is None
    assert feed.embedded_positions is feed.positions_L


def test_documents_must_fill_the_batch() -> None:
    batch = packed_batch(GPT2, LENGTHS, padding=PADDING)
    short = replace(batch, documents=Documents(torch.tensor([0, 24, 40], dtype=torch.int32), 24))
    with pytest.raises(AssertionError, match="documents end at 40 of 48"):
        feed_of(GPT2, short)


def test_rotary_angles_are_those_of_the_positions_given() -> None:
    table = RotaryTable(16, 8, 100.0, torch.device("cpu"))
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 0, 1, 2], [4, 3, 15, 0, 0]])

    def turn(x: Tensor, positions: Tensor | None = None) -> Tensor:
        return rotate_qk(x, x, table.cos_SR, table.sin_SR, positions)[0]

    found = turn(x, positions)
    for row in range(2):
        for s in range(5):
            at = int(positions[row, s])
            alone = turn(x[row : row + 1, s : s + 1].expand(1, at + 1, 3, 8))[:, -1]
            assert torch.equal(found[row : row + 1, s], alone)
    assert torch.equal(turn(x, torch.arange(5).expand(2, 5)), turn(x))


def test_blocks_rotate_by_positions_in_documents() -> None:
    """The scores of a document do not show it: they depend on distances alone."""
    feed = feed_of(LLAMA, packed_batch(LLAMA, LENGTHS, padding=PADDING))
    seen: list[Tensor | None] = []

    def spy(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen.append(positions)
        return rotate_qk(q, k, cos, sin, positions)

    whole_model(LLAMA, kernels=Kernels(attention=reference, rotate_qk=spy))(None, feed)
    assert len(seen) == LLAMA.num_layers
    assert all(positions is feed.document_positions_BS for positions in seen)


def test_positions_of_many_documents_lose_no_gradient_in_bf16() -> None:
    positions = LearnedPositions(GPT2, SINGLE, False).bfloat16()
    x_BLD = torch.zeros(2, 600, GPT2.hidden_size, dtype=torch.bfloat16)
    out = positions(x_BLD, torch.arange(600).expand(2, 600) % 2)
    assert out.dtype is torch.bfloat16
    out.backward(torch.ones_like(out))
    assert positions.weight.grad is not None and positions.weight.grad.dtype is torch.bfloat16
    assert (positions.weight.grad[:2] == 600).all()


@by_name
def test_compiled_blocks_are_not_compiled_again_for_other_documents(cfg: ModelConfig) -> None:
    layers = layers_of(cfg, attention=sdpa_attention)
    plain, compiled = (build_stacks(layers, [(0, len(layers))], noisy_weights(), tp=SINGLE)[0] for _ in range(2))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for module in compiled.modules():
        if isinstance(module, Block):
            module.compile(backend=counter)
    graphs = []
    for lengths in ([[24], [24]], [[7, 1, 16], [3, 12, 5, 4]], [[1] * 24, [2] * 12], [[5, 19], [23, 1]]):
        batch = packed_batch(cfg, lengths)
        _, expected = loss_and_gradients(cfg, plain, batch)
        _, found = loss_and_gradients(cfg, compiled, batch)
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 4
