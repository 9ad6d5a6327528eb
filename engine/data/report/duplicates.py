"""Copies of documents: exact ones by a hash of their tokens, near ones by MinHash.

Near: the Jaccard similarity of the sets of 5-grams of token ids reaches a threshold (Broder, "On the resemblance and
containment of documents", 1997; for language models Lee et al., arXiv 2107.06499). MinHash with locality-sensitive
hashing, of the library datasketch, proposes pairs; each is then compared in full: a pair in the report is true,
while one in twenty of those at the threshold may be missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from engine.data.report.statistics import Part, spread
from engine.errors import DataError

GRAM = 5
"""Tokens of a shingle."""
PERMUTATIONS = 128
LOWEST, HIGHEST = 0.3, 0.99
"""Thresholds for which 128 permutations tell pairs from others."""
RECALL = 0.95
"""Least probability that a pair just at the threshold is proposed; of more similar ones more are."""
_MOST_PROPOSALS = 64
"""Of one document: enough to know that it has copies, few enough for thousands of licence texts."""
_CHUNK = 256
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64
)
"""Odd: the multiplications lose nothing."""


@dataclass(frozen=True, slots=True)
class Copies:
    """Documents as (number of part, number in the part). `groups`: of equal tokens, each of two documents or more."""

    groups: list[list[tuple[int, int]]]
    firsts: list[NDArray[np.int64]]
    """Of each part the documents that are not copies of an earlier one."""


@dataclass(frozen=True, slots=True)
class NearPair:
    """Two documents as (part, number), `a` not later than `b`; `similarity`: Jaccard, exact, 0 to 1."""

    a: tuple[int, int]
    b: tuple[int, int]
    similarity: float


@dataclass(frozen=True, slots=True)
class Near:
    """`pairs`, the most similar first; `compared`: documents of each part; `short`: those of under 5 tokens, left out;
    `capped`: documents with more proposals than were compared.
    """

    pairs: list[NearPair]
    compared: list[int]
    short: int
    capped: int


def exact_copies(parts: Sequence[Part]) -> Copies:
    """Hash (XXH3-128) all documents of all parts; 16 bytes of memory and a few more while they are sorted, for each."""
    digests = bytearray()
    for part in parts:
        for number in range(part.stream.num_documents):
            digests += xxhash.xxh3_128_digest(part.document(number).data)
    keys = np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort(keys.T)  # stable: copies stay in the order of the parts
    differs = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    borders = np.concatenate([[0], np.flatnonzero(differs) + 1, [len(order)]])
    is_first = np.zeros(len(order), dtype=np.bool_)
    is_first[order[borders[:-1]]] = True
    offsets = np.cumsum([0, *(part.stream.num_documents for part in parts)])
    groups = []
    for run in np.flatnonzero(np.diff(borders) > 1):
        members = order[borders[run] : borders[run + 1]]
        places = np.searchsorted(offsets, members, side="right") - 1
        groups.append(list(zip(places.tolist(), (members - offsets[places]).tolist(), strict=True)))
    firsts = [np.flatnonzero(is_first[low:high]) for low, high in pairwise(offsets)]
    return Copies(groups, firsts)


def shingles(tokens: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Hashes of the 5-grams of a document, without repeats, ascending; none for less than 5 tokens."""
    count = len(tokens) - GRAM + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint32)
    ids = tokens.astype(np.uint64) + np.uint64(1)
    mixed = np.zeros(count, dtype=np.uint64)
    for place, prime in enumerate(_FACTORS):
        mixed += ids[place : place + count] * prime
    mixed ^= mixed >> np.uint64(29)
    mixed *= _FACTORS[0]
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> float:
    """Similarity of two ascending sets, 0 to 1."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(len(a) + len(b) - common, 1)


def bands(threshold: float) -> tuple[int, int]:
    """Number and size of the bands: a pair of similarity s shares one with probability 1 - (1 - s**size)**number.

    The largest size that proposes a pair at `threshold` with `RECALL`: it proposes the fewest other pairs.
    """
    sizes = range(PERMUTATIONS // 2, 0, -1)
    found = ((PERMUTATIONS // size, size) for size in sizes)
    return next((n, size) for n, size in found if 1 - (1 - threshold**size) ** n >= RECALL)


def near_copies(parts: Sequence[Part], firsts: Sequence[NDArray[np.int64]], threshold: float, most: int,
                seed: int) -> Near:  # fmt: skip
    """Pairs of the documents `firsts` whose similarity is at least `threshold`, from at most `most` documents.

    Parts come training first. Of too many documents the held-out ones are taken first, up to half of `most`, then
    random ones of training. Raises DataError 470: datasketch is missing.
    """
    minhash, index_of = _datasketch()
    index = index_of(num_perm=PERMUTATIONS, params=bands(threshold))
    permutations = minhash(PERMUTATIONS).permutations
    sets: dict[tuple[int, int], NDArray[np.uint32]] = {}
    pairs, compared, short, capped = [], [0] * len(parts), 0, 0
    for key in _chosen(parts, firsts, most, seed):
        found = shingles(parts[key[0]].document(key[1]))
        compared[key[0]] += 1
        if not len(found):
            short += 1
            continue
        sketch = minhash(hashfunc=int, permutations=permutations, scheme="affine32")
        for start in range(0, len(found), _CHUNK):
            sketch.update_batch(found[start : start + _CHUNK].tolist())
        proposals = sorted(index.query(sketch))
        capped += len(proposals) > _MOST_PROPOSALS
        for other in proposals[:_MOST_PROPOSALS]:
            similarity = jaccard(sets[other], found)
            if similarity >= threshold:
                pairs.append(NearPair(other, key, similarity))
        index.insert(key, sketch, check_duplication=False)
        sets[key] = found
    return Near(sorted(pairs, key=lambda pair: (-pair.similarity, pair.a, pair.b)), compared, short, capped)


def _chosen(
    parts: Sequence[Part], firsts: Sequence[NDArray[np.int64]], most: int, seed: int
) -> Iterator[tuple[int, int]]:
    """Documents to compare, training first."""
    every = [(place, firsts[place]) for place in range(len(parts))]
    training = [entry for entry in every if parts[entry[0]].split == "train"]
    others = [entry for entry in every if parts[entry[0]].split != "train"]
    held_out = sum(len(numbers) for _, numbers in others)
    in_training = sum(len(numbers) for _, numbers in training)
    room = min(held_out, max(most // 2, most - in_training))
    for group, budget in ((training, most - room), (others, room)):
        sizes = [len(numbers) for _, numbers in group]
        kept = spread(sum(sizes), budget, seed)
        borders = np.cumsum([0, *sizes])
        for (place, numbers), low, high in zip(group, borders, borders[1:], strict=False):
            for at in kept[(kept >= low) & (kept < high)] - low:
                yield place, int(numbers[at])


def _datasketch() -> tuple[Any, Any]:
    try:
        library = import_module("datasketch")
    except ImportError as error:
        rule = f"near duplicates are found with the package datasketch, which cannot be imported ({error})"
        way_out = "Run: pip install datasketch; or leave near duplicates out with --no-near"
        raise DataError.of(470, "--threshold", "near duplicates", rule, way_out) from error
    return library.MinHash, library.MinHashLSH
