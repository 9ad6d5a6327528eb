"""Linear and cross-entropy in chunks: values, gradients, what is never allocated, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_kernels.triton import linear_cross_entropy as module
from engine_kernels.triton import linear_cross_entropy_rows as rows
from engine_kernels.triton.linear_cross_entropy import linear_cross_entropy
from tests.helpers.fused_loss import ALL, FLOATS, NAMES, Allocations, draw, exact, measure, unfused
from tests.helpers.twice import assert_twice_as_good

OPERATORS = (module._linear_cross_entropy, module._scale_unless_one)


def set_sizes(monkeypatch: pytest.MonkeyPatch, values: list[Tensor], tokens: int, vectors: int) -> None:
    """Chunks of `tokens` tokens, and tiles of `vectors` vectors of 16 bytes."""
    row_bytes = -(-values[1].shape[0] * values[1].element_size() // 16) * 16
    monkeypatch.setattr(module, "LOGITS_BYTES", tokens * row_bytes)
    monkeypatch.setattr(rows, "TILE_VECTORS", vectors)


def assert_no_gradient_of_nothing(found: list[Tensor], labels: Tensor, vocab_size: int) -> None:
    """Exactly zero past the vocabulary, and for ignored tokens."""
    assert not any(gradient[vocab_size:].any() for gradient in found[2:])
    assert not found[1][labels == -100].any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "vocab_size", "options", "bias", "chunk", "upstream"),
    [
        ((41, 113, 1000), 1000, {}, False, 11, 1.0),
        ((41, 41, 113), 41, ALL, True, 13, 1.0),
        ((41, 7, 123), 123, {"smoothing": 0.2}, True, 41, 3.0),
    ],
)
def test_errors_are_at_most_twice_those_of_torch(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    vocab_size: int,
    options: dict[str, Any],
    bias: bool,
    chunk: int,
    upstream: float,
) -> None:
    values, labels = draw(device, shape, vocab_size, dtype, bias=bias)
    set_sizes(monkeypatch, values, chunk, rows.TILE_VECTORS)
    options = {**options, "vocab_size": vocab_size}
    found = measure(linear_cross_entropy, values, labels, upstream, **options)
    baseline, want = measure(unfused, values, labels, upstream, **options), exact(values, labels, upstream, **options)
    # One number has no mean: as good as torch but for a few roundings.
    allowed = 2 * abs(baseline[0] - want[0]) + 4 * torch.finfo(torch.float32).eps * abs(want[0])
    assert abs(found[0] - want[0]) <= allowed
    for name, *three in zip(NAMES[1:], found[1:], baseline[1:], want[1:], strict=False):
        assert_twice_as_good(name, *three)
    assert_no_gradient_of_nothing(found, labels, vocab_size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "vocab_size", "options", "bias", "chunk", "vectors"),
    [
        ((7, 7, 1000), 123, ALL, True, 3, 32),
        ((7, 1, 113), 113, {"z_loss": 0.1}, False, 1, 4),
        ((1, 7, 1), 1, ALL, True, 1, 1024),
        ((7, 1000, 7), 7, {"logit_scale": -0.3}, False, 7, 1),
        ((41, 7, 41), 1, {}, True, 41, 2),
    ],
)
def test_odd_sizes(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    vocab_size: int,
    options: dict[str, Any],
    bias: bool,
    chunk: int,
    vectors: int,
) -> None:
    """Several tiles in a row, the last of them not full, and sizes of one."""
    values, labels = draw(device, shape, vocab_size, dtype, bias=bias)
    set_sizes(monkeypatch, values, chunk, vectors)
    options = {**options, "vocab_size": vocab_size}
    found, want = measure(linear_cross_entropy, values, labels, 3.0, **options), exact(values, labels, 3.0, **options)
    # Logits of a few units are rounded to half of a few eps, and a gradient at each of up to seven chunks.
    for name, got, right in zip(NAMES, found, want, strict=False):
        near = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), right, rtol=near, atol=near, msg=lambda m, n=name: f"{n}: {m}")
    assert_no_gradient_of_nothing(found, labels, vocab_size)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_buffer_is_read_before_it_is_written(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **options: Any) -> Tensor:
            made = make(*args, **options)
            return made.fill_(float("nan")) if made.dtype.is_floating_point else made

        return filled

    values, labels = draw(device, (13, 7, 113), 41, dtype, bias=True)
    options = {**ALL, "vocab_size": 41}
    set_sizes(monkeypatch, values, 5, 8)
    clean = measure(linear_cross_entropy, values, labels, **options)
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    for found, want in zip(measure(linear_cross_entropy, values, labels, **options), clean, strict=True):
        assert torch.equal(found, want)


def test_logits_never_exist_in_full_and_the_backward_pass_allocates_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, width, entries = 41, 7, 1000
    values, labels = draw(device, (tokens, width, entries), entries, torch.float32)
    whole = measure(linear_cross_entropy, values, labels, vocab_size=entries)
    monkeypatch.setattr(module, "LOGITS_BYTES", 3 * entries * 4)
    leaves = [v.requires_grad_() for v in values]
    with Allocations(*OPERATORS) as forward:
        loss = linear_cross_entropy(*leaves, labels, divisor=torch.tensor(17.0, device=device), vocab_size=entries)
    assert sorted(forward.sizes)[-1] == entries * width
    assert 3 * entries in forward.sizes
    with Allocations(*OPERATORS) as backward:
        loss.backward(torch.tensor(3.0, device=device))
    # The gradients as they were stored, without a copy.
    assert set(backward.sizes) <= {0, 1}
    for leaf, want in zip(leaves, whole[1:], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, 3 * want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "row_bytes", "sizes"),
    [
        (8192, 2 * 128256, [2048] * 4),
        (8191, 2 * 128256, [2048] * 3 + [2047]),
        (8192, 2 * 152064, [1536, 1664, 1664, 1664, 1664]),
        (0, 100, []),
        (1, 2**40, [1]),
        (300, 504 * 2**20 // 100, [100] * 3),
    ],
)
def test_chunks_are_few_and_even(tokens: int, row_bytes: int, sizes: list[int]) -> None:
    chunks = module._chunks(tokens, row_bytes)
    assert [c.stop - c.start for c in chunks] == sizes
    assert [c.start for c in chunks] == [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
def test_only_wanted_gradients(device: torch.device, wanted: tuple[int, ...]) -> None:
    values, labels = draw(device, (7, 7, 41), 41, torch.bfloat16, bias=True)
    options = {**ALL, "divisor": torch.tensor(17.0, device=device), "vocab_size": 41}
    whole = measure(linear_cross_entropy, values, labels, **options)
    leaves = [v.requires_grad_(i in wanted) for i, v in enumerate(values)]
    with Allocations(*OPERATORS) as seen:
        loss = linear_cross_entropy(*leaves[:2], labels, bias_V=leaves[2], **options)
    assert torch.equal(loss.detach(), whole[0])
    assert loss.requires_grad == bool(wanted)
    assert (41 * 7 in seen.sizes) == (1 in wanted)
    assert (7 * 7 in seen.sizes) == (0 in wanted)
    if wanted:
        loss.backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, whole[1 + i])


def test_evaluation_computes_no_gradient(device: torch.device) -> None:
    values, labels = draw(device, (7, 7, 41), 41, torch.float32)
    divisor = torch.tensor(17.0, device=device)
    learned = measure(linear_cross_entropy, values, labels, vocab_size=41)
    leaves = [v.requires_grad_() for v in values]
    with torch.no_grad(), Allocations(*OPERATORS) as seen:
        loss = linear_cross_entropy(*leaves, labels, divisor=divisor, vocab_size=41)
        nothing = linear_cross_entropy(*leaves, torch.full_like(labels, -100), divisor=divisor, vocab_size=41)
    assert torch.equal(loss, learned[0])
    assert not loss.requires_grad
    assert not nothing.any()
    assert 41 * 7 not in seen.sizes


@pytest.mark.parametrize("dtype", FLOATS)
def test_ignored_tokens_and_no_tokens(device: torch.device, dtype: torch.dtype) -> None:
    values, labels = draw(device, (7, 7, 41), 41, dtype, bias=True)
    for x, these in ((values[0], torch.full_like(labels, 5)), (values[0][:0], labels[:0])):
        found = measure(linear_cross_entropy, [x, *values[1:]], these, vocab_size=41, ignore_index=5)
        assert not any(f.any() for f in found)
        assert found[1].shape == x.shape


def test_any_strides(device: torch.device) -> None:
    values, labels = draw(device, (41, 7, 113), 113, torch.bfloat16, bias=True)
    want = measure(linear_cross_entropy, values, labels, vocab_size=113)
    strange = [values[0].t().contiguous().t(), values[1].repeat_interleave(2, 1)[:, ::2], values[2].repeat(2)[:113]]
    divisor = torch.tensor([[17]], device=device)
    found = measure(linear_cross_entropy, strange, labels.repeat_interleave(3)[::3], vocab_size=113, divisor=divisor)
    for got, right in zip(found, want, strict=True):
        assert torch.equal(got, right)
