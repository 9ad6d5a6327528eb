"""Rows of different lengths in one batch, and scaled scores: each row is what it would be alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine_kernels.ops import AttentionFn, sdpa_attention
from engine_kernels.reference.attention import attention as reference

N, H = 6, 8
LENGTHS = [13, 1, 7, 12]
IMPLEMENTATIONS = [reference, sdpa_attention]


def inputs(kv: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output, which is zero at the padding; the padding is far off."""
    generator = torch.Generator().manual_seed(kv)
    length = max(LENGTHS)
    found = []
    for heads in (N, kv, kv, N):
        x = torch.randn(len(LENGTHS), length, heads, H, generator=generator, dtype=torch.float64) * 1.5
        for row, end in enumerate(LENGTHS):
            x[row, end:] = 30.0
        found.append(x.to(dtype))
    for row, end in enumerate(LENGTHS):
        found[3][row, end:] = 0.0
    return found


def forward_backward(fn: AttentionFn, values: list[Tensor], **options: object) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in values[:3])
    out = fn(q, k, v, **options)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3].to(out.dtype))]


def torchs(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def alone(values: list[Tensor], causal: bool, fn: AttentionFn = reference) -> list[Tensor]:
    """Each row cut to its length; zeros at the padding."""
    found = [torch.zeros_like(x) for x in (values[3], *values[:3])]
    for row, end in enumerate(LENGTHS):
        parts = forward_backward(fn, [x[row : row + 1, :end] for x in values], causal=causal)
        for whole, part in zip(found, parts, strict=True):
            whole[row, :end] = part[0]
    return found


def real(x: Tensor) -> Tensor:
    """The positions before the padding, one after the other."""
    return torch.cat([x[row, :end] for row, end in enumerate(LENGTHS)])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv", [6, 3, 1])
@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_each_padded_row_is_what_it_is_alone(fn: AttentionFn, kv: int, causal: bool) -> None:
    values = inputs(kv, torch.float64)
    expected = alone(values, causal)
    found = forward_backward(fn, values, causal=causal, lengths_B=torch.tensor(LENGTHS))
    for name, mine, other in zip(("out", "q", "k", "v"), found, expected, strict=True):
        assert mine.isfinite().all(), name
        # fp64 rounding over 13 positions; values are below 30.
        torch.testing.assert_close(real(mine), real(other), rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for mine in found[2:]:
        for row, end in enumerate(LENGTHS):
            assert not mine[row, end:].any(), "keys and values of the padding have no gradient"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_it_is_as_near_to_fp64_as_torch_in_the_same_dtype(fn: AttentionFn, dtype: torch.dtype, causal: bool) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
        scores = q @ k.transpose(-1, -2) / math.sqrt(H)
        hidden = (torch.arange(q.shape[2]) >= torch.tensor(LENGTHS)[:, None])[:, None, None]
        if causal:
            hidden = hidden | torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2)

    values = inputs(3, dtype)
    exact = alone([x.double() for x in values], causal)
    # torch has two ways: the formula, and kernels that compute weights anew from rounded logarithms of sums.
    baselines = [forward_backward(plain, values, causal=causal), alone(values, causal, torchs)]
    found = forward_backward(fn, values, causal=causal, lengths_B=torch.tensor(LENGTHS))
    for mine, formula, kernel, expected in zip(found, *baselines, exact, strict=True):
        assert mine.dtype is dtype
        error, *allowed = (float((real(x).double() - real(expected)).abs().max()) for x in (mine, formula, kernel))
        # flash-attention's rule: at most twice torch's error in the same dtype.
        assert error <= 2 * max(allowed)


@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_without_padding_are_as_without_lengths(fn: AttentionFn, causal: bool) -> None:
    values = inputs(3, torch.float64)
    full = torch.full((len(LENGTHS),), max(LENGTHS))
    for mine, other in zip(
        forward_backward(fn, values, causal=causal, lengths_B=full),
        forward_backward(fn, values, causal=causal),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_an_empty_row_stays_finite(fn: AttentionFn, causal: bool) -> None:
    values = inputs(3, torch.float32)
    found = forward_backward(fn, values, causal=causal, lengths_B=torch.tensor([0, *LENGTHS[1:]]))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_of_the_padded_reference_is_that_of_finite_differences(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 3, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([3, 2])
    assert torch.autograd.gradcheck(
        lambda *x: reference(*x, causal=causal, scale=0.7, lengths_B=lengths)[[0, 0, 1], [0, 2, 1]], (q, k, v)
    )


@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_the_scale_multiplies_the_scores(fn: AttentionFn, causal: bool) -> None:
    q, k, v, _ = inputs(3, torch.float64)
    lengths = torch.tensor(LENGTHS)
    found = fn(q, k, v, causal=causal, scale=0.125, lengths_B=lengths)
    other = fn(q * (0.125 * math.sqrt(H)), k, v, causal=causal, lengths_B=lengths)
    torch.testing.assert_close(real(found), real(other), rtol=0, atol=1e-12)
    assert not torch.allclose(real(found), real(fn(q, k, v, causal=causal, lengths_B=lengths)))


def test_the_padding_mask_is_never_as_large_as_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, is_causal: bool, **rest: object) -> Tensor:
        seen.append(attn_mask)
        return torch.zeros_like(q)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v, _ = inputs(3, torch.float32)
    for causal in (False, True):
        sdpa_attention(q, k, v, causal=causal, lengths_B=torch.tensor(LENGTHS))
    padded, causal_mask = seen
    assert padded is not None
    assert padded.dtype is torch.bool
    assert padded.shape == (len(LENGTHS), 1, 1, max(LENGTHS))
    assert padded.sum((1, 2, 3)).tolist() == LENGTHS
    assert causal_mask is None, "what comes later is hidden already"
