"""The order of samples: a pure function of seed and step, the same for every layout."""

from __future__ import annotations

import numpy as np
import pytest

from engine.data.sampler import permutation, sample_numbers, shuffled

LAYOUTS_OF_24 = [(1, 24, 1), (1, 1, 24), (2, 3, 4), (4, 3, 2), (8, 3, 1), (24, 1, 1), (3, 2, 4)]


def numbers_of_step(batch: int, dp: int, micro: int, accum: int) -> list[int]:
    return [
        number
        for m in range(accum)
        for d in range(dp)
        for number in sample_numbers(batch, m, dp_rank=d, dp=dp, micro_batch=micro, accum_steps=accum)
    ]


def test_formula_by_hand() -> None:
    # G = 3 * 4 * 2 = 24; batch 5, micro-batch 2, replica 1: 5*24 + (2*2 + 1)*3 = 135
    assert list(sample_numbers(5, 2, dp_rank=1, dp=2, micro_batch=3, accum_steps=4)) == [135, 136, 137]


@pytest.mark.parametrize(("dp", "micro", "accum"), LAYOUTS_OF_24)
def test_samples_of_a_step_depend_on_the_global_batch_only(dp: int, micro: int, accum: int) -> None:
    assert numbers_of_step(7, dp, micro, accum) == list(range(7 * 24, 8 * 24))


@pytest.mark.parametrize(("dp_rank", "micro_index"), [(2, 0), (-1, 0), (0, 4), (0, -1)])
def test_ranks_and_micro_batches_out_of_range_are_refused(dp_rank: int, micro_index: int) -> None:
    with pytest.raises(ValueError, match="of 2, micro_index"):
        sample_numbers(0, micro_index, dp_rank=dp_rank, dp=2, micro_batch=3, accum_steps=4)


@pytest.mark.parametrize("num_samples", [1, 2, 97])
def test_every_epoch_has_every_sample_exactly_once(num_samples: int) -> None:
    for epoch in range(3):
        numbers = range(epoch * num_samples, (epoch + 1) * num_samples)
        assert sorted(shuffled(11, num_samples, n) for n in numbers) == list(range(num_samples))


def test_order_is_reproducible_and_differs_between_seeds_and_epochs() -> None:
    orders = {(seed, epoch): permutation(seed, epoch, 64).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    permutation.cache_clear()
    assert all(permutation(seed, epoch, 64).tolist() == order for (seed, epoch), order in orders.items())


def test_order_is_pinned() -> None:
    """A changed order would silently change every recorded curve."""
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_order_does_not_depend_on_what_was_read_before() -> None:
    forward = [shuffled(3, 50, n) for n in range(120)]
    backward = [shuffled(3, 50, n) for n in reversed(range(120))]
    assert forward == backward[::-1]


def test_shuffling_leaves_no_neighbours_together() -> None:
    order = permutation(0, 0, 10_000)
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.001
