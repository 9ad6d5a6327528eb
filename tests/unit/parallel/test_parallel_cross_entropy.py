"""The vocabulary cut over threads against torch's cross-entropy on the whole of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.dist.context import SINGLE, AxisGroup
from engine.parallel.cross_entropy import IGNORE, mask_padding, vocab_parallel_cross_entropy
from tests.helpers.threads import on_axis

B, S, V, PADDED = 2, 5, 13, 24


def inputs(dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits over the padded vocabulary, huge in the padding, and labels that hit the first and the last token."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, S, PADDED, generator=generator) * scale
    logits[..., V:] = 50.0
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[0, 0], labels[1, -1] = 0, V - 1
    return logits.to(dtype), labels


def weights() -> Tensor:
    """A different weight per token, so that a gradient in the wrong place shows."""
    return torch.linspace(0.5, 2.0, B * S).view(B, S)


def whole(logits: Tensor, labels: Tensor, smoothing: float = 0.0, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss per token and gradient of the logits, in fp64, padding left out."""
    z = logits.double().requires_grad_()
    loss = F.cross_entropy(
        z[..., :V].flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE, label_smoothing=smoothing
    ).view(B, S)
    loss = loss + z_loss * z[..., :V].logsumexp(-1).square() * (labels != IGNORE)
    (loss * weights()).sum().backward()
    assert z.grad is not None
    return loss.detach(), z.grad


def cut(
    logits: Tensor, labels: Tensor, size: int, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[list[Tensor], Tensor]:
    """Loss per token on each rank, and the ranks' gradients side by side."""

    def rank(tp: AxisGroup) -> tuple[Tensor, Tensor]:
        z = logits.chunk(size, dim=-1)[tp.rank].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(z, labels, vocab_size=V, tp=tp, smoothing=smoothing, z_loss=z_loss)
        (loss * weights()).sum().backward()
        assert z.grad is not None
        return loss.detach(), z.grad

    losses, grads = zip(*on_axis(rank, size), strict=True)
    return list(losses), torch.cat(grads, dim=-1)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_loss_and_gradient_are_those_of_the_whole_vocabulary(size: int) -> None:
    # 8 ranks of 3 columns: padding takes the end of one rank and all of three others.
    logits, labels = inputs()
    loss, grad = whole(logits, labels)
    losses, grads = cut(logits, labels, size)
    for mine in losses:
        assert mine.dtype is torch.float32
        assert torch.equal(mine, losses[0]), "equal on all ranks"
        torch.testing.assert_close(mine.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads.double(), grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-1)])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_smoothing_z_loss_and_positions_without_target(
    size: int, smoothing: float, z_loss: float, ignored: bool
) -> None:
    logits, labels = inputs()
    if ignored:
        labels[0, 2] = labels[1, :3] = IGNORE
    loss, grad = whole(logits, labels, smoothing, z_loss)
    plain, _ = whole(logits, labels)
    losses, grads = cut(logits, labels, size, smoothing, z_loss)
    assert float((loss - plain).abs().max()) > 1e-2, "smoothing and z-loss show"
    for mine in losses:
        assert torch.equal(mine, losses[0]), "equal on all ranks"
        torch.testing.assert_close(mine.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads.double(), grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(losses[0][labels == IGNORE], torch.zeros(4 if ignored else 0))
    assert not grads[labels == IGNORE].any()


@pytest.mark.parametrize("size", [1, 2, 8])
def test_padding_gets_no_gradient_at_all(size: int) -> None:
    _, grads = cut(*inputs(), size)
    assert torch.equal(grads[..., V:], torch.zeros(B, S, PADDED - V))


@pytest.mark.parametrize("size", [1, 2])
def test_large_logits_neither_overflow_nor_lose_the_loss(size: int) -> None:
    logits, labels = inputs(scale=1e4)
    loss, grad = whole(logits, labels)
    losses, grads = cut(logits, labels, size)
    assert float(loss.max()) > 1e4
    torch.testing.assert_close(losses[0].double(), loss, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(grads.double(), grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2])
def test_bf16_logits_lose_nothing_but_their_own_rounding(size: int) -> None:
    logits, labels = inputs(torch.bfloat16)
    loss, grad = whole(logits, labels)
    losses, grads = cut(logits, labels, size)
    assert losses[0].dtype is torch.float32
    assert grads.dtype is torch.bfloat16
    torch.testing.assert_close(losses[0].double(), loss, rtol=1e-6, atol=1e-6)
    # The gradient is rounded once: bf16 has 8 bits of mantissa.
    torch.testing.assert_close(grads.double(), grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_the_given_logits_are_not_overwritten(size: int) -> None:
    logits, labels = inputs()

    def rank(tp: AxisGroup) -> None:
        mine = logits.chunk(size, dim=-1)[tp.rank].clone()
        kept = mine.clone()
        vocab_parallel_cross_entropy(mine, labels, vocab_size=V, tp=tp)
        assert torch.equal(mine, kept)

    on_axis(rank, size)


@pytest.mark.parametrize(("size", "masked"), [(1, [11]), (2, [0, 11]), (4, [0, 0, 5, 6]), (8, [0] * 4 + [2, 3, 3, 3])])
def test_mask_padding_masks_the_columns_past_the_vocabulary(size: int, masked: list[int]) -> None:
    found = []
    for rank in range(size):
        axis = AxisGroup(rank=rank, size=size, ranks=tuple(range(size)), group=None)
        logits = torch.zeros(B, S, PADDED // size)
        assert mask_padding(logits, V, axis) is logits
        assert torch.equal(torch.isinf(logits).sum(-1), torch.isinf(logits[0, 0]).sum().expand(B, S))
        found.append(int(torch.isinf(logits[0, 0]).sum()))
        assert not torch.isinf(logits[..., : PADDED // size - found[-1]]).any(), "only the end of a rank is masked"
    assert found == masked


def test_mask_padding_touches_nothing_without_padding() -> None:
    logits = torch.ones(1, 1, 8)
    assert torch.equal(mask_padding(logits, 8, SINGLE), torch.ones(1, 1, 8))
