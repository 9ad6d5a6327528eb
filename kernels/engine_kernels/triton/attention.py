"""FlashAttention in Triton (arXiv 2205.14135, 2307.08691): every mask that cuts intervals, head dims up to 256.

Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim. Sums have a fixed order: two runs give the
same bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine_kernels.attention_autograd import Gradients, differentiate_by, gradients_like
from engine_kernels.documents import Documents, piece_starts
from engine_kernels.interpreter import require_gpu
from engine_kernels.reference.attention import AttentionDropout, require_window
from engine_kernels.reference.dropout import keep_limit, mask_salt
from engine_kernels.triton.attention_backward import delta_kernel, keys_kernel, queries_kernel
from engine_kernels.triton.attention_forward import forward_kernel
from engine_kernels.triton.attention_parts import document_bounds_kernel

WIDEST = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Blocks(NamedTuple):
    """Queries and keys of a tile, and how many warps and pipeline stages work on it."""

    M: int
    K: int
    warps: int
    stages: int


# By head dim, rounded up to a power of two; fastest of those tried on an H200 in 16 bits (benchmarks/LOG.md).
# No key tile is as wide as the head: there Triton 3.6's assembler overwrites the queries inside the loop (the LOG).
FORWARD = {32: Blocks(64, 64, 4, 3), 64: Blocks(64, 128, 4, 3), 128: Blocks(64, 64, 4, 3), 256: Blocks(64, 32, 4, 3)}
KEYS = {32: Blocks(64, 64, 4, 2), 64: Blocks(128, 64, 4, 2), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 64, 8, 2)}
QUERIES = {32: Blocks(64, 64, 4, 3), 64: Blocks(64, 128, 4, 3), 128: Blocks(64, 64, 4, 3), 256: Blocks(64, 32, 4, 2)}
# fp32 products stay off the tensor cores, whose TF32 would keep 10 bits.
SINGLE = Blocks(32, 32, 4, 1)


def attention(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    lengths_B: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    documents: Documents | None = None,
    window: int | None = None,
) -> Tensor:
    """As `engine_kernels.reference.attention`, and with its dropout mask; scores are never stored.

    Any strides are taken; outputs and gradients are contiguous, gradients in the dtype of their tensor.

    Raises:
        ValueError: a shape, dtype, device or option that the kernels do not take.
    """
    _require_fitting(q_BSNH, k_BSKH, v_BSKH, window)
    _, S, _, H = q_BSNH.shape
    starts = None
    if documents is not None:
        starts = documents.starts
    elif lengths_B is not None and not causal:
        # What is padded is a document of its own.
        starts = piece_starts(lengths_B, S)
    p, row_keys = (0.0, None) if dropout is None or dropout.p == 0.0 else (dropout.p, dropout.keys())
    scale = H**-0.5 if scale is None else scale
    out, _ = _forward(q_BSNH, k_BSKH, v_BSKH, starts, row_keys, causal, scale, window or 0, p)
    return out


def _require_fitting(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    for name, x in (("q_BSNH", q), ("k_BSKH", k), ("v_BSKH", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: attention takes (batch, sequence, heads, head dim)")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}: attention in Triton takes bf16, fp16 or fp32, the same for q, k, v")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q_BSNH on {q.device}: attention takes tensors of one device")
        require_gpu(name, x)
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k_BSKH {tuple(k.shape)} and v_BSKH {tuple(v.shape)} do not go with q_BSNH {tuple(q.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k_BSKH has {k.shape[2]} heads, which do not divide the {q.shape[2]} of q_BSNH")
    if not 1 <= q.shape[3] <= WIDEST:
        raise ValueError(f"q_BSNH has head dim {q.shape[3]}: attention in Triton takes 1 to {WIDEST}")
    if max(q.shape[1] * max(x.stride(1), q.shape[2] * q.shape[3]) for x in (q, k, v)) >= 2**31:
        raise ValueError(f"q_BSNH has shape {tuple(q.shape)}: a row of q, k and v may span less than 2^31 elements")
    require_window(window)


class _Launch(NamedTuple):
    """What all kernels of one call are given."""

    width: int
    descriptors: bool
    bounds: tuple[Tensor, Tensor]
    row_keys: Tensor
    sizes: tuple[int, int, int, int]
    scale: float
    window: int
    drop: tuple[int, int, float]
    flags: dict[str, Any]

    def of(self, x: Tensor, block: int) -> Any:
        """`x` as a kernel loads its tiles: by a descriptor of the tensor memory accelerator, or by pointers."""
        if not self.descriptors:
            return x
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block, 1, self.width])


def _launch(
    q: Tensor,
    k: Tensor,
    others: tuple[Tensor, ...],
    starts: Tensor | None,
    row_keys: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    p: float,
) -> _Launch:
    _, S, N, H = q.shape
    width = max(32, triton.next_power_of_2(H))
    descriptors = all(map(_can_be_described, (q, k, *others)))
    return _Launch(
        width=width,
        descriptors=descriptors,
        bounds=(q, q) if starts is None else _bounds(starts, q),
        row_keys=q if row_keys is None else row_keys,
        sizes=(N, N // k.shape[2], S, H),
        scale=scale * math.log2(math.e),
        window=window,
        drop=(mask_salt(0), keep_limit(p), 1 / (1 - p)) if p else (0, 0, 0.0),
        flags={
            "WIDTH": width,
            "CAUSAL": causal,
            "WINDOW": window > 0,
            "BOUNDS": starts is not None,
            "DROPOUT": p > 0,
            "TMA": descriptors,
            "PRECISION": "fp32" if not q.is_cuda else "ieee" if q.dtype == torch.float32 else "tf32",
        },
    )


def _can_be_described(x: Tensor) -> bool:
    """Compute capability 9.0, and what its descriptors ask for: 16-byte aligned strides, the last one 1."""
    if not x.is_cuda or x.element_size() != 2 or torch.cuda.get_device_capability(x.device)[0] < 9:
        return False
    strides = [stride * 2 for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 16 == 0 and stride for stride in strides)


def _bounds(starts: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    total, count = q.shape[0] * q.shape[1], starts.numel() - 1
    begin, end = (torch.empty(total, device=q.device, dtype=torch.int32) for _ in range(2))
    steps = max(count, 1).bit_length()
    grid = (triton.cdiv(total, 1024),)
    document_bounds_kernel[grid](starts, begin, end, count, total, q.shape[1], STEPS=steps, BLOCK=1024)
    return begin, end


def _blocks(table: dict[int, Blocks], q: Tensor, width: int) -> Blocks:
    return SINGLE if q.dtype == torch.float32 else table[width]


@torch.library.custom_op("octant::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    row_keys: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    p: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, S, N, H) and the base-2 logarithms of the softmax's denominators, fp32 (B, N, S)."""
    B, S, N, _ = q.shape
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _vectors(q)
    if out.numel() == 0:
        return out, lse
    with torch.cuda.device_of(q):  # where Triton launches
        go = _launch(q, k, (v,), starts, row_keys, causal, scale, window, p)
        use = _blocks(FORWARD, q, go.width)
        forward_kernel[(triton.cdiv(S, use.M), B * N)](
            go.of(q, use.M), go.of(k, use.K), go.of(v, use.K), out, lse, *go.bounds, go.row_keys,
            q.stride(), k.stride(), v.stride(), go.sizes, go.scale, go.window, go.drop,
            M=use.M, K=use.K, num_warps=use.warps, num_stages=use.stages, **go.flags,
        )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), _vectors(q)


def _vectors(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("octant::attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    row_keys: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    B, S, N, _ = q.shape
    dq, dk, dv = gradients_like(q, k, v)
    if dq.numel() == 0:
        return dq, dk, dv
    with torch.cuda.device_of(q):  # where Triton launches
        if S * do.stride(1) >= 2**31:
            do = do.contiguous()
        go = _launch(q, k, (v, do), starts, row_keys, causal, scale, window, p)
        delta, strides = _vectors(q), (q.stride(), k.stride(), v.stride(), do.stride())
        delta_kernel[(triton.cdiv(S, 64), B * N)](
            out, do, delta, out.stride(), do.stride(), go.sizes, M=64, WIDTH=go.width, num_warps=4
        )
        use = _blocks(KEYS, q, go.width)
        keys_kernel[(triton.cdiv(S, use.K), B * k.shape[2])](
            go.of(q, use.M), k, v, go.of(do, use.M), dk, dv, lse, delta, *go.bounds, go.row_keys, *strides,
            go.sizes, go.scale, scale, go.window, go.drop,
            M=use.M, K=use.K, num_warps=use.warps, num_stages=use.stages, **go.flags,
        )  # fmt: skip
        use = _blocks(QUERIES, q, go.width)
        queries_kernel[(triton.cdiv(S, use.M), B * N)](
            go.of(q, use.M), go.of(k, use.K), go.of(v, use.K), go.of(do, use.M), dq, lse, delta, *go.bounds,
            go.row_keys, *strides, go.sizes, go.scale, scale, go.window, go.drop,
            M=use.M, K=use.K, num_warps=use.warps, num_stages=use.stages, **go.flags,
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Gradients:
    return gradients_like(q, k, v)


differentiate_by(_forward, _backward, tensors=2)
