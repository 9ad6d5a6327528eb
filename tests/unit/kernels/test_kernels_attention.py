"""Attention on the CPU: the reference against the formula, torch's implementation against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine_kernels import ops
from engine_kernels.ops import AttentionFn, sdpa_attention
from engine_kernels.reference.attention import attention as reference

B, N, H = 2, 6, 8
LENGTHS = [1, 7, 41]
KV_HEADS = [6, 3, 2, 1]

shapes = [
    pytest.param(length, kv, causal, id=f"{length}-{kv}-{'causal' if causal else 'full'}")
    for length in LENGTHS
    for kv in KV_HEADS
    for causal in (True, False)
]


def inputs(length: int, kv: int, dtype: torch.dtype, heads: int = N) -> list[Tensor]:
    """Query, key and value, and a gradient of the output; far from uniform attention."""
    generator = torch.Generator().manual_seed(length * 10 + kv)
    sizes = ((B, length, heads, H), (B, length, kv, H), (B, length, kv, H), (B, length, heads, H))
    return [(torch.randn(size, generator=generator, dtype=torch.float64) * 1.5).to(dtype) for size in sizes]


def forward_backward(fn: AttentionFn, values: list[Tensor], causal: bool) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    q, k, v = (x.clone().requires_grad_() for x in values[:3])
    out = fn(q, k, v, causal=causal)
    out.backward(values[3].to(out.dtype))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def by_hand(values: list[Tensor], causal: bool) -> Tensor:
    """One query and one head at a time, in fp64."""
    q, k, v = (x.double() for x in values[:3])
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            group = n // (q.shape[2] // k.shape[2])
            for s in range(q.shape[1]):
                seen = s + 1 if causal else k.shape[1]
                scores = [float(q[b, s, n] @ k[b, t, group]) / math.sqrt(H) for t in range(seen)]
                total = sum(math.exp(score) for score in scores)
                out[b, s, n] = sum(math.exp(score) / total * v[b, t, group] for t, score in enumerate(scores))  # type: ignore[assignment]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv", KV_HEADS)
def test_the_reference_is_the_formula(kv: int, causal: bool) -> None:
    values = inputs(7, kv, torch.float64)
    torch.testing.assert_close(reference(*values[:3], causal=causal), by_hand(values, causal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_of_the_reference_is_that_of_finite_differences(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 3, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: reference(*x, causal=causal), (q, k, v))


@pytest.mark.parametrize(("length", "kv", "causal"), shapes)
def test_torchs_attention_is_the_reference(length: int, kv: int, causal: bool) -> None:
    values = inputs(length, kv, torch.float32)
    expected = forward_backward(reference, [x.double() for x in values], causal)
    found = forward_backward(sdpa_attention, values, causal)
    assert [x.shape for x in found] == [x.shape for x in expected]
    for name, mine, other in zip(("out", "q", "k", "v"), found, expected, strict=True):
        # fp32 rounding over at most 41 positions; values are below 20.
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("length", "kv", "causal"), [(7, 2, True), (41, 6, True), (41, 1, False)])
def test_in_bf16_it_is_as_near_to_fp64_as_the_formula_in_bf16(length: int, kv: int, causal: bool) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(H)
        if causal:
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    values = inputs(length, kv, torch.bfloat16)
    exact = forward_backward(reference, [x.double() for x in values], causal)
    baseline = forward_backward(plain, values, causal)
    for fn in (sdpa_attention, reference):
        for mine, other, expected in zip(forward_backward(fn, values, causal), baseline, exact, strict=True):
            assert mine.dtype is torch.bfloat16
            error, allowed = ((x.double() - expected).abs().max() for x in (mine, other))
            # flash-attention's rule: at most twice the error of the plain formula in the same dtype.
            assert float(error) <= 2 * float(allowed)


@pytest.mark.parametrize("fn", [reference, sdpa_attention])
def test_causal_means_that_later_keys_and_values_are_not_seen(fn: AttentionFn) -> None:
    q, k, v, _ = inputs(7, 3, torch.float32)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, 4:], changed_v[:, 4:] = 9.0, -9.0
    before, after = fn(q, k, v, causal=True), fn(q, changed_k, changed_v, causal=True)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-6)
    assert ((after - before)[:, 4:].abs().amax(dim=(0, 2, 3)) > 0.1).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [7, 30]])
@pytest.mark.parametrize("window", [1, 5, 100])
def test_windows_are_those_of_the_reference(window: int, lengths: list[int] | None, causal: bool) -> None:
    q, k, v, _ = inputs(41, 3, torch.float64)
    lengths_B = None if lengths is None else torch.tensor(lengths)
    options = {"causal": causal, "window": window, "lengths_B": lengths_B}
    found, expected = (fn(q, k, v, **options) for fn in (ops.attention, reference))  # type: ignore[operator]
    assert found.isfinite().all() and expected.isfinite().all()
    real = [slice(None, None if lengths is None else lengths[row]) for row in range(B)]
    for row in range(B):
        torch.testing.assert_close(found[row, real[row]], expected[row, real[row]], rtol=0, atol=1e-12)
    far = k.clone()
    far[:, 0] = 50.0
    moved = reference(q, far, v, **options)  # type: ignore[arg-type]
    assert torch.equal(moved[:, window:20], expected[:, window:20])


def test_a_window_of_nothing_is_refused() -> None:
    q, k, v, _ = inputs(7, 3, torch.float32)
    with pytest.raises(ValueError, match="window is 0: a query sees at least itself, so it is 1 or more"):
        ops.attention(q, k, v, causal=True, window=0)
