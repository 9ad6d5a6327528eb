"""What the forward and backward kernels of attention share: tiles, visible intervals, dropout masks.

Every query sees one interval of keys, and every key is seen from one interval of queries, whatever the mask: causal,
documents, padding and sliding windows all cut intervals. Over the positions of a row both ends never fall, so the
first and last position of a block bound what the whole block sees.

Tuples among the arguments: `sizes` (N, N / K, S, H), `strides` of (B, S, N, H), `drop` (salt, limit, 1 / (1 - p)).
Positions count from the start of their row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(x, strides, b, n, start, sizes, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Positions [start, start + BLOCK) of head `n`, (BLOCK, WIDTH); zero past S and H. With TMA `x` is a descriptor."""
    if TMA:
        tile = x.load([b, start, n, 0]).reshape(BLOCK, WIDTH)
    else:
        rows, columns = start + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
        base = x + b.to(tl.int64) * strides[0] + n.to(tl.int64) * strides[2]
        offsets = rows[:, None] * strides[1] + columns[None, :] * strides[3]
        tile = tl.load(base + offsets, mask=(rows < sizes[2])[:, None] & (columns < sizes[3])[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(x, tile, b, n, heads, start, sizes, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Write a tile of head `n` to a contiguous (B, S, heads, H)."""
    rows, columns = start + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    base = x + (b.to(tl.int64) * sizes[2] * heads + n) * sizes[3]
    offsets = (rows * heads)[:, None] * sizes[3] + columns[None, :]
    mask = (rows < sizes[2])[:, None] & (columns < sizes[3])[None, :]
    tl.store(base + offsets, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b (+ acc) in fp32. PRECISION "fp32": of operands made fp32 first, which the interpreter needs for bf16.

    Of fp32 operands each tile's product is summed apart from `acc`: one long sum errs 2 to 5 times as much.
    """
    if PRECISION == "fp32":
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32 and acc is not None:
        # A plain addition would be merged into the product again.
        out = tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, acc)
    else:
        out = tl.dot(a, b, acc, input_precision=PRECISION)
    return out


@triton.jit
def interval(
    at, begin, end, S, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BOUNDS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """[low, high) of keys that the query `at` sees, or with KEYS of the queries that see the key `at`.

    `begin` and `end` (S,) hold the first position of the document that each position of the row is in, and the one
    past its last.
    """
    if BOUNDS:
        low = tl.load(begin + at, mask=at < S, other=S)
        high = tl.load(end + at, mask=at < S, other=S)
    else:
        low, high = at * 0, at * 0 + S
    if CAUSAL:
        if KEYS:
            low = tl.maximum(low, at)
        else:
            high = tl.minimum(high, at + 1)
    if WINDOW:
        low, high = tl.maximum(low, at - window + 1), tl.minimum(high, at + window)
    return low, high


@triton.jit
def phases(
    start, begin, end, S, window, BLOCK: tl.constexpr, STEP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BOUNDS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Borders a <= b <= c <= d of what the block at `start` meets in steps of STEP: only [b, c) needs no mask."""
    last = tl.minimum(start + BLOCK, S) - 1
    low_first, high_first = interval(start, begin, end, S, window, CAUSAL, WINDOW, BOUNDS, KEYS)
    low_last, high_last = interval(last, begin, end, S, window, CAUSAL, WINDOW, BOUNDS, KEYS)
    a = low_first // STEP * STEP
    b = tl.minimum(tl.cdiv(low_last, STEP), tl.cdiv(high_last, STEP)) * STEP
    c = tl.maximum(high_first // STEP * STEP, b)
    return a, b, c, high_last


@triton.jit
def mix(x):
    """lowbias32 of unsigned integers, see `engine_kernels.reference.dropout`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(keys, channels, drop):
    """Whether pairs of a row's key and a channel (a key position) are kept, as `reference.dropout` says."""
    mixed = mix(channels.to(tl.uint32) ^ drop[0].to(tl.uint32))
    return mix(keys.to(tl.uint32, bitcast=True) ^ mixed).to(tl.int32, bitcast=True) < drop[1]


@triton.jit
def document_bounds_kernel(starts, begin, end, count, total, S, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """`begin` and `end` of `interval`, int32 (total,), by bisection of `starts` (count + 1,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + count
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        reached = tl.load(starts + middle) <= at
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle - 1)
    row = at // S * S
    tl.store(begin + at, tl.load(starts + low) - row, mask=at < total)
    tl.store(end + at, tl.load(starts + tl.minimum(low + 1, count)) - row, mask=at < total)
