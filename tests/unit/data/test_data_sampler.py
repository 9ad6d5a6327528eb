"""The order of samples: a pure function of seed, fingerprint and sample number, the same for every layout.

Each statistic is a fixed draw with a bound that a uniform permutation with another seed breaks with the probability
stated beside it.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine.data.samples.sampler import Shuffle, sample_numbers

LAYOUTS_OF_24 = [(1, 24, 1), (1, 1, 24), (2, 3, 4), (4, 3, 2), (8, 3, 1), (24, 1, 1), (3, 2, 4)]


def numbers_of(first: int, dp: int, micro: int, accum: int) -> list[int]:
    return [
        number
        for m in range(accum)
        for d in range(dp)
        for number in sample_numbers(first, m, dp_rank=d, dp=dp, micro_batch=micro, accum_steps=accum)
    ]


def epoch(size: int, number: int = 0, seed: int = 0, fingerprint: str = "f") -> list[int]:
    order: list[int] = Shuffle(seed, fingerprint, size)(np.arange(number * size, (number + 1) * size)).tolist()
    return order


def test_formula_by_hand() -> None:
    # 120 samples were read; micro-batch 2, replica 1: 120 + (2*2 + 1)*3 = 135
    assert list(sample_numbers(120, 2, dp_rank=1, dp=2, micro_batch=3, accum_steps=4)) == [135, 136, 137]


@pytest.mark.parametrize(("dp", "micro", "accum"), LAYOUTS_OF_24)
def test_samples_of_a_step_depend_on_the_samples_read_and_the_global_batch_only(
    dp: int, micro: int, accum: int
) -> None:
    assert numbers_of(170, dp, micro, accum) == list(range(170, 194))


@pytest.mark.parametrize(("dp_rank", "micro_index"), [(2, 0), (-1, 0), (0, 4), (0, -1)])
def test_ranks_and_micro_batches_out_of_range_are_refused(dp_rank: int, micro_index: int) -> None:
    with pytest.raises(ValueError, match="of 2, micro_index"):
        sample_numbers(0, micro_index, dp_rank=dp_rank, dp=2, micro_batch=3, accum_steps=4)


@pytest.mark.parametrize("size", [*range(1, 34), 97, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537, 100_000])
def test_every_epoch_has_every_sample_exactly_once(size: int) -> None:
    for number in (0, 1, 10**6):
        assert sorted(epoch(size, number)) == list(range(size))


def test_a_corpus_of_any_size_needs_no_list_of_its_samples() -> None:
    size = 3 * 10**14
    order = Shuffle(0, "f", size)
    found = order(np.arange(1000) + 5 * size - 500)
    assert found.min() >= 0 and found.max() < size and len(set(found.tolist())) > 990


@pytest.mark.parametrize("size", [50, 300])
def test_numbers_of_three_epochs_are_looked_up_at_once_in_any_shape_and_order(size: int) -> None:
    order, numbers = Shuffle(3, "f", size), np.arange(2 * size + 20)
    whole = order(numbers)
    assert whole.tolist() == [int(order(np.array([n]))[0]) for n in numbers]
    assert order(numbers[::-1]).tolist() == whole[::-1].tolist()
    assert order(numbers.reshape(4, -1)).tolist() == whole.reshape(4, -1).tolist()


def test_seed_fingerprint_and_epoch_each_change_the_order() -> None:
    orders = {tuple(epoch(64, number, seed, name)) for number in (0, 1) for seed in (0, 1) for name in "fg"}
    assert len(orders) == 8


def test_order_is_pinned() -> None:
    """A changed order would silently change every recorded curve."""
    assert epoch(10) == [5, 7, 3, 6, 1, 0, 2, 9, 4, 8]
    assert epoch(300)[:5] == [203, 237, 2, 57, 13]
    large = Shuffle(7, "fingerprint", 10**9)(np.array([0, 1, 10**9 - 1, 10**9, 12 * 10**9]))
    assert large.tolist() == [498474732, 645871916, 421560668, 122881748, 997941018]


@pytest.mark.parametrize("size", [5, 37, 300])
def test_every_sample_is_equally_likely_at_every_place(size: int) -> None:
    """Chi-square of (place, sample) over 4000 epochs. A uniform one is above mean + 6 deviations with p < 1e-6."""
    epochs = 4000
    table = np.zeros((size, size))
    order = Shuffle(1, "f", size)(np.arange(epochs * size)).reshape(epochs, size)
    for place in range(size):
        table[place] = np.bincount(order[:, place], minlength=size)
    expected = epochs / size
    statistic = float(((table - expected) ** 2 / expected).sum())
    freedom = (size - 1) ** 2
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom) + 6


def test_neighbours_part_and_pairs_are_uniform() -> None:
    """Of 2**16 - 1 neighbours about two stay neighbours (Poisson; more than 16 with p < 1e-9)."""
    size = 1 << 16
    order = np.array(epoch(size))
    assert int((np.abs(np.diff(order)) == 1).sum()) <= 16
    cells = np.bincount((order[:-1] >> 12) * 16 + (order[1:] >> 12), minlength=256)
    statistic = float(((cells - size / 256) ** 2 / (size / 256)).sum())
    assert abs(statistic - 255) < 6 * np.sqrt(2 * 255)
