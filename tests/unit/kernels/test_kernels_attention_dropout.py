"""Dropped attention weights: the reference by its keys, fused attention by a seeded generator; both can be repeated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine_kernels.ops import AttentionDropout, AttentionFn, attention_keys, dropout, row_keys, sdpa_attention
from engine_kernels.reference.attention import attention as reference
from engine_kernels.seeded import seeded

B, S, N, H = 2, 7, 6, 8
CPU = torch.device("cpu")


def drop(p: float = 0.25, seed: int = 1, first_head: int = 0, heads: int = N) -> AttentionDropout:
    def keys() -> Tensor:
        return attention_keys(row_keys(seed, 0, torch.arange(B), torch.arange(S)), first_head, heads)

    return AttentionDropout(p=p, seed=seed, keys=keys)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, heads, H, generator=generator, dtype=dtype, requires_grad=True) for heads in (N, N, N)]


def weights(fn: AttentionFn, how: AttentionDropout | None, **options: object) -> Tensor:
    """The attention weights (B, N, S, S) of equal scores, read off with one-hot values."""
    zeros = torch.zeros(B, S, N, H, dtype=torch.float64)
    one_hot = torch.eye(S, H, dtype=torch.float64)[None, :, None].expand(B, S, N, H)
    out = fn(zeros, zeros, one_hot, causal=False, dropout=how, **options)  # type: ignore[arg-type]
    return out.transpose(1, 2)[..., :S]


def test_the_reference_drops_by_the_keys_of_heads_and_queries() -> None:
    found = weights(reference, drop())
    expected = dropout(torch.full((B, N, S, S), 1 / S, dtype=torch.float64), drop().keys(), 0.25)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert (found == 0).any()


def test_the_reference_drops_the_same_weights_for_a_part_of_the_heads() -> None:
    whole = reference(*(x for x in inputs()), causal=True, dropout=drop())
    part = reference(*(x[:, :, 2:4] for x in inputs()), causal=True, dropout=drop(first_head=2, heads=2))
    torch.testing.assert_close(part, whole[:, :, 2:4], rtol=0, atol=1e-15)


@pytest.mark.parametrize("fn", [reference, sdpa_attention])
def test_dropped_weights_are_zero_and_the_others_scaled_for_their_mean(fn: AttentionFn) -> None:
    drawn = torch.stack([weights(fn, drop(seed=seed)) for seed in range(50)])
    kept = drawn > 0
    torch.testing.assert_close(drawn, kept.double() / (0.75 * S), rtol=0, atol=1e-12)
    # A binomial count of 29400 lies further than five standard deviations out once in 2e6 times.
    assert abs(float(kept.sum()) - 0.75 * kept.numel()) < 5 * (0.75 * 0.25 * kept.numel()) ** 0.5
    assert all(not torch.equal(kept[0], other) for other in kept[1:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fn", [reference, sdpa_attention])
def test_a_recomputation_drops_the_same_weights(fn: AttentionFn, causal: bool) -> None:
    lengths = torch.tensor([S, 3])

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fn(q, k, v, causal=causal, lengths_B=lengths, dropout=drop()).square()

    values = inputs()
    plain = torch.autograd.grad(layer(*values)[:, :3].sum(), values)
    out = checkpoint(layer, *values, use_reentrant=False, preserve_rng_state=False)
    torch.rand(3)  # moves the outer generator before the second run
    for mine, other in zip(torch.autograd.grad(out[:, :3].sum(), values), plain, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-15)


@pytest.mark.parametrize("fn", [reference, sdpa_attention])
def test_the_global_generator_stays_where_it_was(fn: AttentionFn) -> None:
    before = torch.get_rng_state()
    fn(*inputs(), causal=True, dropout=drop())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fn", [reference, sdpa_attention])
def test_probability_zero_drops_nothing(fn: AttentionFn) -> None:
    values = inputs()
    assert torch.equal(fn(*values, causal=True, dropout=drop(p=0.0)), fn(*values, causal=True))


def test_the_gradient_of_the_reference_with_dropout_is_that_of_finite_differences() -> None:
    q, k, v = (x[:, :, :2, :4].detach().requires_grad_() for x in inputs())
    how = drop(heads=2)
    assert torch.autograd.gradcheck(lambda *x: reference(*x, causal=True, dropout=how), (q, k, v))


@pytest.mark.parametrize("fn", [reference, sdpa_attention])
def test_compiled_attention_drops_the_same_weights(fn: AttentionFn) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fn(q * 2, k, v, causal=True, dropout=drop())

    values = inputs()
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(*values), layer(*values), rtol=0, atol=1e-15)


def test_a_seed_draws_the_same_numbers_and_the_outer_ones_go_on() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(2)
    drawn = []
    for seed in (5, 5, 6):
        with seeded(seed, CPU):
            drawn.append(torch.rand(3))
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_an_error_inside_gives_the_outer_numbers_back() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(5, CPU):
        torch.rand(5)
        1 / 0  # noqa: B018
    assert torch.equal(torch.get_rng_state(), before)
