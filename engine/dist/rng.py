"""Seeds: one number in the config becomes an independent one per purpose. No code draws from a global generator."""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, independent of every other purpose's."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
