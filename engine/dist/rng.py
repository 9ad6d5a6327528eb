"""Seeds. One number in the config becomes an independent stream per purpose and per axis."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from engine.dist.context import AxisGroup, ParallelContext


def stream_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, independent of every other purpose's."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int, ctx: ParallelContext) -> None:
    """Seed the global generators, which only dropout uses (initial weights have their own generator per tensor).

    Tensor-parallel ranks share a stream, so that replicated activations are dropped alike; replicas and stages differ.
    """
    value = stream_seed(seed, "dropout", ctx.coord.pp, ctx.coord.dp)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


class ShardedRng:
    """A random stream of its own for each tensor-parallel rank, for dropout inside sharded regions.

    Outside `fork` the ranks share the stream of replicated regions, which `fork` leaves where it was.
    """

    def __init__(self, tp: AxisGroup) -> None:
        self._purpose = ("sharded", tp.rank)
        self._state: torch.Tensor | None = None

    @contextmanager
    def fork(self, device: torch.device) -> Iterator[None]:
        """Draw from the rank's own stream inside the block."""
        cuda = device.type == "cuda"
        outside = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
        if self._state is None:
            seed = stream_seed(torch.initial_seed(), *self._purpose)
            self._state = torch.Generator(device).manual_seed(seed).get_state()
        put = (lambda state: torch.cuda.set_rng_state(state, device)) if cuda else torch.set_rng_state
        put(self._state)
        try:
            yield
        finally:
            self._state = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
            put(outside)
