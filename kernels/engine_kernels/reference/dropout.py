"""Dropout without a state: whether an element is kept is a pure function of who it is.

A row (one sample at one position, at one site of the model) has a 32-bit key; an element is kept when the hash of its
row's key and its channel lies below a threshold. No layout changes the mask, nothing is stored for the backward pass,
and a recomputation finds the same mask. The hash is the 32-bit mixer "lowbias32" (C. Wellons, "Prospecting for Hash
Functions", 2018; two multiplications, three xor-shifts), a bijection: distinct inputs have distinct hashes.

Shapes: B rows of a batch, S positions, N heads, D channels. All integers are int32 that wrap around.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd: the increment of SplitMix64."""


def _signed(word: int) -> int:
    """The int32 with the bits of `word`."""
    return ((word & _WORD) ^ 0x80000000) - 0x80000000


_MULTIPLIERS = (_signed(0x7FEB352D), _signed(0x846CA68B))


def _mix(x: Tensor) -> Tensor:
    """lowbias32 of each element. The shifts of int32 are arithmetic, so the sign bits that they bring in are masked."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MULTIPLIERS[1]
    return x ^ ((x >> 16) & 0xFFFF)


def _word(*values: int) -> int:
    """An int32 made of the low 64 bits of each of `values` by the finaliser of SplitMix64 (Steele et al., 2014)."""
    state = 0
    for value in values:
        state = (state ^ value) + _GOLDEN & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return _signed(state >> 32)


def _low_word(x: Tensor) -> Tensor:
    """The low 32 bits of integers as int32, by a conversion that is exact on every device."""
    return (((x.long() & _WORD) ^ 0x80000000) - 0x80000000).int()


def row_keys(seed: int, site: int, samples_B: Tensor, positions_S: Tensor) -> Tensor:
    """Keys of the rows of one site of the model.

    Args:
        seed: of the run, 64 bits.
        site: number of the place in the model that drops; two places with different numbers drop independently.
        samples_B: global sample numbers, any integer dtype.
        positions_S: positions in the whole sequence, any integer dtype.

    Returns:
        int32 (B, S). Not to be compiled: arithmetic of 64 bits in Python.
    """
    keys_B = _mix(_low_word(samples_B) ^ _word(seed, site, 0))
    keys_B = _mix(keys_B ^ _low_word(samples_B.long() >> 32) ^ _word(seed, site, 1))
    return _mix(keys_B[:, None] ^ _mix(_low_word(positions_S) ^ _word(seed, site, 2)))


def attention_keys(row_keys_BS: Tensor, first_head: int, count: int) -> Tensor:
    """Keys of the rows of attention weights: one for each head and query position.

    Args:
        row_keys_BS: int32, of the query positions.
        first_head, count: the logical query heads that this rank computes.

    Returns:
        int32 (B, N, S) with N = `count`.
    """
    heads_N = torch.arange(first_head, first_head + count, dtype=torch.int32, device=row_keys_BS.device)
    return _mix(row_keys_BS[:, None, :] ^ _mix(heads_N ^ _word(1))[:, None])


def mask_salt(salt: int) -> int:
    """What channels are combined with before they are hashed, int32."""
    return _word(salt, 2)


def keep_limit(p: float) -> int:
    """Elements whose hash, int32, is below this are kept: (1 - p) * 2^32 of the signed range."""
    return round((1.0 - p) * 2**32) - 2**31


def _apply_mask(x: Tensor, keys: Tensor, p: float, salt: int) -> Tensor:
    channels_D = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    hashes = _mix(keys[..., None] ^ _mix(channels_D ^ mask_salt(salt)))
    return torch.where(hashes < keep_limit(p), x * (1.0 / (1.0 - p)), 0.0)


class _Dropout(torch.autograd.Function):
    """The mask is linear and its own adjoint; it is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, p: float, salt: int) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.p, ctx.salt = p, salt
        return _apply_mask(x, keys, p, salt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _apply_mask(grads[0], keys, ctx.p, ctx.salt), None, None, None


def dropout(x: Tensor, keys: Tensor, p: float, salt: int = 0) -> Tensor:
    """Zero elements of `x` with probability `p` and scale the others by 1 / (1 - p) (Srivastava et al., 2014).

    Args:
        x: (..., D), a floating dtype; the mask does not depend on it.
        keys: int32 (...), see `row_keys` and `attention_keys`.
        p: in [0, 1). 0 gives `x` itself.
        salt: number that makes one row's masks independent where several tensors share its keys.

    Raises:
        ValueError: `p` is out of range.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout p={p} is not in [0, 1)")
    if p == 0.0:
        return x
    return cast(Tensor, _Dropout.apply(x, keys, p, salt))
