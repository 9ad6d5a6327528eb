"""Counter-based dropout. A test of randomness states its false-alarm rate: keys are fixed, so it fails always or never,
and the rate says how likely a good hash is to fail it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine_kernels.ops import attention_keys, dropout, row_keys

SAMPLES, POSITIONS, CHANNELS = torch.arange(64), torch.arange(128), 128
ONES = torch.ones(len(SAMPLES), len(POSITIONS), CHANNELS)
SIGMAS = 5.5
"""A normal variable lies further out with probability 4e-8; no test here draws more than 2000 of them: < 1e-4."""


def keys(seed: int = 1234, site: int = 7) -> Tensor:
    return row_keys(seed, site, SAMPLES, POSITIONS)


def kept(p: float, keys_BS: Tensor, salt: int = 0, channels: int = CHANNELS) -> Tensor:
    """The mask as fp64 zeros and ones, (..., `channels`)."""
    return (dropout(torch.ones(*keys_BS.shape, channels), keys_BS, p, salt) != 0).double()


def deviations(found: Tensor, probability: float, trials: int) -> Tensor:
    """How many standard deviations binomial counts lie from their mean."""
    return (found - trials * probability).abs() / math.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_holds_in_all_in_each_channel_sample_and_position(p: float) -> None:
    mask = kept(p, keys())
    for dims in ((0, 1, 2), (0, 1), (1, 2), (0, 2)):
        count = mask.sum(dims)
        assert deviations(count, 1 - p, mask.numel() // count.numel()).max() < SIGMAS, dims


def test_rows_have_counts_of_a_binomial_distribution() -> None:
    # Mean of 8192 squared deviations, each a chi-square of one degree: the standard error is sqrt(2 / 8192).
    squares = deviations(kept(0.1, keys()).sum(-1), 0.9, CHANNELS) ** 2
    assert abs(float(squares.mean()) - 1) < SIGMAS * math.sqrt(2 / squares.numel())


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("distance", [1, 2, 3, 8, 16, 31])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_along_a_dim_are_independent(p: float, distance: int, dim: int) -> None:
    mask = kept(p, keys())
    length = mask.shape[dim] - distance
    both = mask.narrow(dim, 0, length) * mask.narrow(dim, distance, length)
    # Products of neighbours overlap in one factor, which widens the spread: variance of the mean of x y, see below.
    keep = 1 - p
    variance = keep**2 * (1 - keep**2) + 2 * keep**3 * (1 - keep)
    assert abs(float(both.mean()) - keep**2) < SIGMAS * math.sqrt(variance / both.numel())


def test_patterns_of_eight_channels_are_all_equally_likely() -> None:
    bits = kept(0.5, keys()).unflatten(-1, (-1, 8)).long()
    patterns = (bits * 2 ** torch.arange(8)).sum(-1).flatten()
    expected = patterns.numel() / 256
    chi_square = float(((torch.bincount(patterns, minlength=256) - expected) ** 2 / expected).sum())
    # 255 degrees of freedom, and for so many nearly normal: mean 255, variance 510.
    assert abs(chi_square - 255) < SIGMAS * math.sqrt(510)


def other_masks() -> dict[str, Tensor]:
    p, base = 0.5, keys()
    heads = attention_keys(base, 0, 2)
    return {
        "base": kept(p, base),
        "next site": kept(p, keys(site=8)),
        "far site": kept(p, keys(site=1_000_007)),
        "next seed": kept(p, keys(seed=1235)),
        "seed with another high word": kept(p, keys(seed=1234 + 2**40)),
        "next salt": kept(p, base, salt=1),
        "next samples": kept(p, row_keys(1234, 7, SAMPLES + 64, POSITIONS)),
        "samples with another high word": kept(p, row_keys(1234, 7, SAMPLES + 2**32, POSITIONS)),
        "next positions": kept(p, row_keys(1234, 7, SAMPLES, POSITIONS + 128)),
        "next channels": kept(p, base, channels=2 * CHANNELS)[..., CHANNELS:],
        "head 0": kept(p, heads[:, 0]),
        "head 1": kept(p, heads[:, 1]),
    }


def test_sites_seeds_salts_samples_positions_and_heads_are_independent() -> None:
    masks = other_masks()
    for (one, a), (other, b) in itertools.combinations(masks.items(), 2):
        agree = (a == b).double()
        for dims in ((0, 1, 2), (0, 1), (1, 2)):
            count = agree.sum(dims)
            # 66 pairs of at most 193 counts: 1.3e4 normal variables, a false alarm in 2000 times.
            assert deviations(count, 0.5, agree.numel() // count.numel()).max() < SIGMAS, (one, other, dims)


def test_no_mask_is_another_one_moved_by_some_channels() -> None:
    for (one, a), (other, b) in itertools.combinations(other_masks().items(), 2):
        for shift in (-3, -2, -1, 1, 2, 3):
            agree = (a.roll(shift, -1) == b).sum()
            assert deviations(agree, 0.5, a.numel()) < SIGMAS, (one, other, shift)


def test_rows_of_a_large_batch_have_keys_that_hardly_ever_meet() -> None:
    # 2^20 keys of 32 bits: 128 pairs meet on average, a Poisson variable.
    many = row_keys(0, 0, torch.arange(1024), torch.arange(1024)).flatten()
    assert abs(many.numel() - many.unique().numel() - 128) < SIGMAS * math.sqrt(128)


def test_masks_stay_what_they_were() -> None:
    # By the documented arithmetic: other values mean that no earlier run can be repeated.
    found = row_keys(1234, 7, torch.tensor([0, 2**32 + 5]), torch.tensor([0, 1]))
    assert found.dtype is torch.int32
    assert found.tolist() == by_hand_keys(1234, 7, [0, 2**32 + 5], [0, 1])
    assert found.tolist() == [[-1990820568, -1653832959], [-1209684152, 563146149]]
    assert kept(0.5, found).long()[0, 0, :32].tolist() == [int(by_hand_kept(found[0, 0], c, 0.5, 0)) for c in range(32)]
    assert kept(0.1, found, 3).long()[1, 1].tolist() == [
        int(by_hand_kept(found[1, 1], c, 0.1, 3)) for c in range(CHANNELS)
    ]


def by_hand_mix(x: int) -> int:
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def by_hand_word(*values: int) -> int:
    state = 0
    for value in values:
        state = (state ^ value) + 0x9E3779B97F4A7C15 & 2**64 - 1
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 2**64 - 1
        state ^= state >> 31
    return state >> 32


def by_hand_keys(seed: int, site: int, samples: list[int], positions: list[int]) -> list[list[int]]:
    """The keys with Python's integers, as unsigned words until the end."""
    low, high, place = (by_hand_word(seed, site, i) for i in range(3))
    rows = [by_hand_mix(by_hand_mix(sample ^ low) ^ sample >> 32 ^ high) for sample in samples]
    words = [[by_hand_mix(row ^ by_hand_mix(position ^ place)) for position in positions] for row in rows]
    return [[word - 2**32 if word >= 2**31 else word for word in row] for row in words]


def by_hand_kept(key: Tensor, channel: int, p: float, salt: int) -> bool:
    word = by_hand_mix(int(key) ^ by_hand_mix(channel ^ by_hand_word(salt, 2)))
    return (word + 2**31) % 2**32 < round((1 - p) * 2**32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_is_the_same_in_every_dtype_and_the_kept_are_scaled(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 33, dtype=torch.float64).to(dtype)
    some = row_keys(1, 2, torch.arange(2), torch.arange(5))
    out = dropout(x, some, 0.25)
    assert out.dtype is dtype
    mask = kept(0.25, some, channels=33) != 0
    assert torch.equal(out, torch.where(mask, x * (1 / 0.75), 0.0))


def test_a_part_of_the_rows_or_heads_has_its_part_of_the_masks() -> None:
    whole = kept(0.3, keys())
    part = row_keys(1234, 7, SAMPLES[5:9], POSITIONS[32:64])
    assert torch.equal(kept(0.3, part), whole[5:9, 32:64])
    heads = attention_keys(part, 0, 6)
    assert heads.shape == (4, 6, 32)
    assert torch.equal(attention_keys(part, 4, 2), heads[:, 4:])
    assert torch.equal(kept(0.3, part, channels=17), whole[5:9, 32:64, :17])


def test_what_is_dropped_does_not_leak_values_that_are_not_finite() -> None:
    some = keys()
    out = dropout(torch.full_like(ONES, float("inf")), some, 0.5)
    assert torch.equal(torch.isfinite(out), kept(0.5, some) == 0)


def test_the_gradient_has_the_mask_of_the_forward_pass_and_keeps_nothing_large() -> None:
    x = torch.randn(3, 4, 16, dtype=torch.float64, requires_grad=True)
    some = row_keys(1, 2, torch.arange(3), torch.arange(4))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = dropout(x, some, 0.4)
    assert saved == [some.numel()]
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(x))
    assert torch.equal(grad, dropout(torch.ones_like(x), some, 0.4))
    assert torch.autograd.gradcheck(lambda y: dropout(y, some, 0.4, 1), x)
    assert torch.autograd.gradgradcheck(lambda y: dropout(y, some, 0.4, 1), x)


def test_a_recomputation_repeats_the_mask() -> None:
    x = torch.randn(3, 4, 16, requires_grad=True)
    some = row_keys(1, 2, torch.arange(3), torch.arange(4))

    def layer(y: Tensor) -> Tensor:
        return dropout(y.exp(), some, 0.4).square()

    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    again = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], plain)


def test_it_is_one_graph_that_new_keys_do_not_make_anew() -> None:
    x = torch.randn(3, 4, 16, requires_grad=True)
    compiled = torch.compile(lambda y, k: dropout(y * 2, k, 0.4), fullgraph=True, backend="aot_eager")
    for step in range(3):
        some = row_keys(1, step, torch.arange(3) + step, torch.arange(4))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            out = compiled(x, some)
        assert torch.equal(out, dropout(x * 2, some, 0.4))
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(x))
        assert torch.equal(grad, dropout(torch.ones_like(x), some, 0.4) * 2)


def test_without_dropout_it_is_the_input_itself() -> None:
    assert dropout(ONES, keys(), 0.0) is ONES


@pytest.mark.parametrize("p", [1.0, -0.1])
def test_a_probability_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout p={p} is not in \[0, 1\)"):
        dropout(ONES, keys(), p)
