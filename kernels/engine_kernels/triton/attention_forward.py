"""FlashAttention's forward pass (arXiv 2205.14135, 2307.08691) with a base-2 softmax, one kernel for all masks."""

from __future__ import annotations

import triton
import triton.language as tl

from engine_kernels.triton.attention_parts import interval, kept, load_tile, phases, product, store_tile


@triton.jit
def _add_keys(
    acc, top, total, q, k, v, k_strides, v_strides, b, n, lo, hi, sizes, scale, low, high, keys, drop,
    K: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys [lo, hi) to the running maximum, sum and output of a block of queries."""
    for start in tl.range(lo, hi, K):
        k_tile = load_tile(k, k_strides, b, n, start, sizes, K, WIDTH, TMA)
        scores = product(q, k_tile.T, None, PRECISION)
        columns = start + tl.arange(0, K)
        if MASKED:
            seen = (columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1) * scale)
        # A row that has seen nothing yet: -inf less -inf is no number.
        base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(kept(keys[:, None], columns[None, :], drop), weights * drop[2], 0.0)
        v_tile = load_tile(v, v_strides, b, n, start, sizes, K, WIDTH, TMA)
        acc = product(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)
        top = new
    return acc, top, total


@triton.jit
def forward_kernel(
    q, k, v, out, lse, begin, end, row_keys, q_strides, k_strides, v_strides, sizes, scale, window, drop,
    M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BOUNDS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of M queries of one head; programs (blocks, B * N). `lse` (B, N, S) is base 2, of scaled scores."""
    N, S = sizes[0], sizes[2]
    # The last queries of a causal row have most to do, so they start first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    b, n = tl.program_id(1) // N, tl.program_id(1) % N
    row, vectors = b.to(tl.int64) * S, tl.program_id(1).to(tl.int64) * S
    at = start + tl.arange(0, M)
    low, high = interval(at, begin + row, end + row, S, window, CAUSAL, WINDOW, BOUNDS, False)
    keys = tl.load(row_keys + vectors + at, mask=at < S, other=0) if DROPOUT else at
    q_tile = load_tile(q, q_strides, b, n, start, sizes, M, WIDTH, TMA)
    acc = tl.zeros((M, WIDTH), tl.float32)
    top, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    a, b0, c, d = phases(start, begin + row, end + row, S, window, M, K, CAUSAL, WINDOW, BOUNDS, False)
    kv = n // sizes[1]
    if WINDOW or BOUNDS:
        if BOUNDS:
            # Documents are short: three loops would spend more on filling their pipelines than masks cost.
            b0, c = d, d
        acc, top, total = _add_keys(
            acc, top, total, q_tile, k, v, k_strides, v_strides, b, kv, a, b0, sizes, scale, low, high, keys, drop,
            K, WIDTH, True, DROPOUT, TMA, PRECISION,
        )  # fmt: skip
    acc, top, total = _add_keys(
        acc, top, total, q_tile, k, v, k_strides, v_strides, b, kv, b0, c, sizes, scale, low, high, keys, drop,
        K, WIDTH, False, DROPOUT, TMA, PRECISION,
    )  # fmt: skip
    acc, top, total = _add_keys(
        acc, top, total, q_tile, k, v, k_strides, v_strides, b, kv, c, d, sizes, scale, low, high, keys, drop,
        K, WIDTH, True, DROPOUT, TMA, PRECISION,
    )  # fmt: skip
    tl.store(lse + vectors + at, top + tl.log2(total), mask=at < S)
    store_tile(out, acc / total[:, None], b, n, N, start, sizes, M, WIDTH)
