"""Random numbers for a block of code from a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the global generator of `device` (CPU or CUDA) starts from `seed`; afterwards it is where it was.

    The same seed draws the same numbers whenever the block runs, so that a recomputation repeats its first run.
    """
    cuda = device.type == "cuda"
    outside = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    if cuda:
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_rng_state(outside, device)
        else:
            torch.set_rng_state(outside)
