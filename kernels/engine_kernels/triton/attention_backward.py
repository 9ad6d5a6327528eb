"""FlashAttention's backward pass (arXiv 2307.08691, algorithm 2), scores computed again from `lse`.

With P = softmax(S), D = rowsum(dO * O): dV = P^T dO, dS = P * (dO V^T - D), dQ = scale dS K, dK = scale dS^T Q. Keys
and queries have a kernel each, so that every sum has a fixed order. One kernel for both, which adds dQ atomically, does
five products in place of seven and was slower on an H200 (benchmarks/LOG.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine_kernels.triton.attention_parts import interval, kept, load_tile, phases, product, store_tile


@triton.jit
def delta_kernel(out, grad, delta, out_strides, grad_strides, sizes, M: tl.constexpr, WIDTH: tl.constexpr):
    """D of each query, (B, N, S) fp32. Programs (blocks, B * N)."""
    N, S = sizes[0], sizes[2]
    b, n, start = tl.program_id(1) // N, tl.program_id(1) % N, tl.program_id(0) * M
    mine = load_tile(out, out_strides, b, n, start, sizes, M, WIDTH, False).to(tl.float32)
    other = load_tile(grad, grad_strides, b, n, start, sizes, M, WIDTH, False).to(tl.float32)
    at = start + tl.arange(0, M)
    tl.store(delta + tl.program_id(1).to(tl.int64) * S + at, tl.sum(mine * other, 1), mask=at < S)


@triton.jit
def _add_queries(
    dk, dv, k, v, q, do, q_strides, do_strides, lse, delta, row_keys, b, n, lo, hi, sizes, scale, low, high, columns,
    drop, M: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the queries [lo, hi) of one head give to the gradients of a block of keys and values."""
    for start in tl.range(lo, hi, M):
        at = start + tl.arange(0, M)
        inside = at < sizes[2]
        q_tile = load_tile(q, q_strides, b, n, start, sizes, M, WIDTH, TMA)
        scores = product(k, q_tile.T, None, PRECISION)
        weights = tl.exp2(scores * scale - tl.load(lse + at, mask=inside, other=0.0)[None, :])
        if MASKED:
            weights = tl.where((at[None, :] >= low[:, None]) & (at[None, :] < high[:, None]), weights, 0.0)
        do_tile = load_tile(do, do_strides, b, n, start, sizes, M, WIDTH, TMA)
        dropped = weights
        if DROPOUT:
            keys = tl.load(row_keys + at, mask=inside, other=0)
            keeps = kept(keys[None, :], columns[:, None], drop)
            dropped = tl.where(keeps, weights * drop[2], 0.0)
        dv = product(dropped.to(do_tile.dtype), do_tile, dv, PRECISION)
        dp = product(v, do_tile.T, None, PRECISION)
        if DROPOUT:
            dp = tl.where(keeps, dp * drop[2], 0.0)
        ds = weights * (dp - tl.load(delta + at, mask=inside, other=0.0)[None, :])
        dk = product(ds.to(q_tile.dtype), q_tile, dk, PRECISION)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, do, dk, dv, lse, delta, begin, end, row_keys, q_strides, k_strides, v_strides, do_strides, sizes, scale,
    factor, window, drop, M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BOUNDS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of K keys and values of one head, over all its queries. Programs (blocks, B * kv heads)."""
    groups, S = sizes[1], sizes[2]
    kv_heads = sizes[0] // groups
    b, kv, start = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads, tl.program_id(0) * K
    row, at = b.to(tl.int64) * S, start + tl.arange(0, K)
    low, high = interval(at, begin + row, end + row, S, window, CAUSAL, WINDOW, BOUNDS, True)
    # Loaded by pointers: from a descriptor they would stay in registers, where there is no room.
    k_tile = load_tile(k, k_strides, b, kv, start, sizes, K, WIDTH, False)
    v_tile = load_tile(v, v_strides, b, kv, start, sizes, K, WIDTH, False)
    key_sum, value_sum = tl.zeros((K, WIDTH), tl.float32), tl.zeros((K, WIDTH), tl.float32)
    a, b0, c, d = phases(start, begin + row, end + row, S, window, K, M, CAUSAL, WINDOW, BOUNDS, True)
    for group in range(groups):
        n = kv * groups + group
        vectors = (b * sizes[0] + n).to(tl.int64) * S
        if CAUSAL or WINDOW or BOUNDS:
            key_sum, value_sum = _add_queries(
                key_sum, value_sum, k_tile, v_tile, q, do, q_strides, do_strides, lse + vectors, delta + vectors,
                row_keys + vectors, b, n, a, b0, sizes, scale, low, high, at, drop,
                M, WIDTH, True, DROPOUT, TMA, PRECISION,
            )  # fmt: skip
        key_sum, value_sum = _add_queries(
            key_sum, value_sum, k_tile, v_tile, q, do, q_strides, do_strides, lse + vectors, delta + vectors,
            row_keys + vectors, b, n, b0, c, sizes, scale, low, high, at, drop,
            M, WIDTH, False, DROPOUT, TMA, PRECISION,
        )  # fmt: skip
        key_sum, value_sum = _add_queries(
            key_sum, value_sum, k_tile, v_tile, q, do, q_strides, do_strides, lse + vectors, delta + vectors,
            row_keys + vectors, b, n, c, d, sizes, scale, low, high, at, drop,
            M, WIDTH, True, DROPOUT, TMA, PRECISION,
        )  # fmt: skip
    store_tile(dk, key_sum * factor, b, kv, kv_heads, start, sizes, K, WIDTH)
    store_tile(dv, value_sum, b, kv, kv_heads, start, sizes, K, WIDTH)


@triton.jit
def _add_keys(
    dq, q, do, lse, delta, k, v, k_strides, v_strides, b, kv, lo, hi, sizes, scale, low, high, keys, drop,
    K: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys [lo, hi) give to the gradient of a block of queries."""
    for start in tl.range(lo, hi, K):
        k_tile = load_tile(k, k_strides, b, kv, start, sizes, K, WIDTH, TMA)
        v_tile = load_tile(v, v_strides, b, kv, start, sizes, K, WIDTH, TMA)
        scores = product(q, k_tile.T, None, PRECISION)
        dp = product(do, v_tile.T, None, PRECISION)
        weights = tl.exp2(scores * scale - lse[:, None])
        columns = start + tl.arange(0, K)
        if MASKED:
            weights = tl.where((columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]), weights, 0.0)
        if DROPOUT:
            dp = tl.where(kept(keys[:, None], columns[None, :], drop), dp * drop[2], 0.0)
        dq = product((weights * (dp - delta[:, None])).to(k_tile.dtype), k_tile, dq, PRECISION)
    return dq


@triton.jit
def queries_kernel(
    q, k, v, do, dq, lse, delta, begin, end, row_keys, q_strides, k_strides, v_strides, do_strides, sizes, scale,
    factor, window, drop, M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, BOUNDS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of M queries of one head. Programs (blocks, B * N)."""
    N, S = sizes[0], sizes[2]
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    b, n = tl.program_id(1) // N, tl.program_id(1) % N
    row, vectors = b.to(tl.int64) * S, tl.program_id(1).to(tl.int64) * S
    at = start + tl.arange(0, M)
    low, high = interval(at, begin + row, end + row, S, window, CAUSAL, WINDOW, BOUNDS, False)
    q_tile = load_tile(q, q_strides, b, n, start, sizes, M, WIDTH, TMA)
    do_tile = load_tile(do, do_strides, b, n, start, sizes, M, WIDTH, TMA)
    top = tl.load(lse + vectors + at, mask=at < S, other=0.0)
    mean = tl.load(delta + vectors + at, mask=at < S, other=0.0)
    keys = tl.load(row_keys + vectors + at, mask=at < S, other=0) if DROPOUT else at
    acc = tl.zeros((M, WIDTH), tl.float32)
    a, b0, c, d = phases(start, begin + row, end + row, S, window, M, K, CAUSAL, WINDOW, BOUNDS, False)
    kv = n // sizes[1]
    if WINDOW or BOUNDS:
        acc = _add_keys(
            acc, q_tile, do_tile, top, mean, k, v, k_strides, v_strides, b, kv, a, b0, sizes, scale, low, high, keys,
            drop, K, WIDTH, True, DROPOUT, TMA, PRECISION,
        )  # fmt: skip
    acc = _add_keys(
        acc, q_tile, do_tile, top, mean, k, v, k_strides, v_strides, b, kv, b0, c, sizes, scale, low, high, keys,
        drop, K, WIDTH, False, DROPOUT, TMA, PRECISION,
    )  # fmt: skip
    acc = _add_keys(
        acc, q_tile, do_tile, top, mean, k, v, k_strides, v_strides, b, kv, c, d, sizes, scale, low, high, keys,
        drop, K, WIDTH, True, DROPOUT, TMA, PRECISION,
    )  # fmt: skip
    store_tile(dq, acc * factor, b, n, N, start, sizes, M, WIDTH)
