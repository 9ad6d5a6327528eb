"""Several sources in exact proportions.

The order is the one of Megatron-core's BlendedDataset (helpers.cpp, build_blending_indices): sample n comes from the
source that lags most behind its share. It repeats after a cycle of as many samples as the shares need to come out
even, so the source of any sample is a look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.samples.dataset import Rows, Samples
from engine.data.samples.sampler import Shuffle
from engine.data.samples.stream import Positions
from engine.model.batch import IGNORE

MIN_CYCLE = 1 << 16
MAX_CYCLE = 1 << 20
"""Shares whose common denominator is larger are rounded to multiples of 1 / MAX_CYCLE."""


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    """`weights`, greater than 0, as shares that sum to 1 and have a common denominator of at most `MAX_CYCLE`.

    A weight means the simplest fraction near it: 0.1 a tenth, not the binary number beside it. Where shares are
    rounded, what is missing goes to the largest remainders.
    """
    exact = [Fraction(weight).limit_denominator(MAX_CYCLE) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    if lcm(*(share.denominator for share in shares)) <= MAX_CYCLE:
        return shares
    counts = [int(share * MAX_CYCLE) for share in shares]
    remainders = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * MAX_CYCLE)
    for source in remainders[: MAX_CYCLE - sum(counts)]:
        counts[source] += 1
    return [Fraction(count, MAX_CYCLE) for count in counts]


@dataclass(frozen=True, slots=True, eq=False)
class Cycle:
    """`sources` int16 (N,): where each sample of a cycle comes from. `before` int64 (N,): how many of the cycle's
    samples before it come from the same source. `counts` int64 (sources,): samples of each source in a cycle.
    """

    sources: NDArray[np.int16]
    before: NDArray[np.int64]
    counts: NDArray[np.int64]

    def place(self, numbers: Positions) -> tuple[Positions, Positions]:
        """Source of each blended sample number, and its number within the source."""
        cycles, at = np.divmod(numbers, len(self.sources))
        sources = self.sources[at].astype(np.int64)
        return sources, cycles * self.counts[sources] + self.before[at]


@lru_cache(maxsize=1)
def cycle(weights: tuple[float, ...]) -> Cycle:
    """The order of one cycle, which has at least `MIN_CYCLE` samples.

    Sample n is of the source with the largest w_d * max(n, 1) - count_d, the first of equal ones. A share is reached
    exactly at the end of a cycle: no source is ever a whole sample ahead, and the leads and lags sum to 0.
    """
    shares = exact_shares(weights)
    denominator = lcm(*(share.denominator for share in shares))
    length = -(-MIN_CYCLE // denominator) * denominator
    sources = np.array(_greedy([float(share) for share in shares], length), dtype=np.int16)
    before = np.empty(length, dtype=np.int64)
    counts = np.bincount(sources, minlength=len(shares))
    for source, count in enumerate(counts.tolist()):
        before[sources == source] = np.arange(count)
    return Cycle(sources, before, counts)


def _greedy(shares: list[float], length: int) -> list[int]:
    counts, order = [0] * len(shares), []
    for number in range(length):
        scale = float(max(number, 1))
        errors = [share * scale - count for share, count in zip(shares, counts, strict=True)]
        source = errors.index(max(errors))
        counts[source] += 1
        order.append(source)
    return order


def interleaved(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Sources and samples, int64 (sum of `sizes`, 2): each source's samples in order, spread evenly."""
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    both = [(np.repeat(np.arange(len(sizes)), sizes)), np.concatenate([np.arange(size) for size in sizes])]
    return np.stack(both, axis=1)[np.argsort(places, kind="stable")]


class Blended:
    """Samples of several sources as one. Index: the source's first index plus the sample's within the source."""

    def __init__(self, parts: Sequence[Samples], end: int) -> None:
        """`end`: the token that fills padding."""
        self._parts, self._end = parts, end
        self._firsts = np.concatenate([[0], np.cumsum([part.num_samples for part in parts])])
        self.causal, self.masked = parts[0].causal, parts[0].masked
        known = {part.known_length for part in parts}
        self.known_length = known.pop() if len(known) == 1 else None

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return int(self._firsts[-1])

    def index(self, sources: Positions, samples: Positions) -> Positions:
        """Indices of `samples` of `sources`."""
        return self._firsts[sources] + samples

    def read(self, indices: Positions, numbers: Positions) -> Rows:
        """Samples `indices`, each from its source."""
        sources = np.searchsorted(self._firsts, indices, side="right") - 1
        chosen = [np.flatnonzero(sources == source) for source in np.unique(sources)]
        found = [
            self._parts[sources[rows[0]]].read(indices[rows] - self._firsts[sources[rows[0]]], numbers[rows])
            for rows in chosen
        ]
        return found[0] if len(found) == 1 else _merged(found, np.concatenate(chosen), self._end)


class BlendedOrder:
    """Global sample numbers to indices: the blend's order of sources, and in each source its own shuffled epochs."""

    def __init__(self, blended: Blended, weights: Sequence[float], orders: Sequence[Shuffle]) -> None:
        self._blended, self._orders = blended, orders
        self._cycle = cycle(tuple(weights))

    def __call__(self, numbers: Positions) -> Positions:
        """Indices into the blended samples, of the same shape."""
        sources, within = self._cycle.place(numbers)
        samples = np.empty_like(within)
        for source, order in enumerate(self._orders):
            chosen = sources == source
            if chosen.any():
                samples[chosen] = order(within[chosen])
        return self._blended.index(sources, samples)


def _merged(parts: Sequence[Rows], rows: Positions, end: int) -> Rows:
    """Rows of several sources; row i of them one after the other becomes row rows[i]. What is short is padded."""
    width = max(part.tokens.shape[1] for part in parts)
    back = np.argsort(rows)

    def joined(arrays: Sequence[NDArray[Any] | None], fill: int) -> NDArray[Any] | None:
        known = [array for array in arrays if array is not None]
        if not known:
            return None
        padded = [np.pad(one, ((0, 0), (0, width - one.shape[1])), constant_values=fill) for one in known]
        return np.concatenate(padded)[back]

    sentences = [part.sentences for part in parts if part.sentences is not None]
    return Rows(
        tokens=np.asarray(joined([part.tokens for part in parts], end)),
        labels=np.asarray(joined([part.labels for part in parts], IGNORE)),
        lengths=np.concatenate([part.lengths for part in parts])[back],
        types=joined([part.types for part in parts], 0),
        sentences=np.concatenate(sentences)[back] if sentences else None,
        starts=joined([part.starts for part in parts], 0),
    )
