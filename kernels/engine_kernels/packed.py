"""Attention inside the documents of packed rows, without a mask over the row.

Shapes: T = B * S positions of all rows, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from engine_kernels.documents import Documents
from engine_kernels.reference.attention import band

_WIDEST_HEAD = 192
"""Of torch's flash backward on all devices from compute capability 8.0 on."""


# Lengths of documents are values that decide about shapes, which no compiled graph could hold without being compiled
# again for the next batch.
@torch.compiler.disable
def packed_attention(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    scale: float | None,
    documents: Documents,
    window: int | None = None,
    p: float = 0.0,
) -> Tensor:
    """Attention of each document over itself, (B, S, N, H); a break in a compiled graph.

    On GPUs in 16 bits and without dropout it is one call of torch's variable-length flash kernel. Elsewhere it is one
    call of scaled_dot_product_attention for each length that occurs, with all documents of that length.

    Args:
        p: probability of dropping a weight; drawn from the global generator of the device.
    """
    rows = q_BSNH.shape[0]
    q_TNH, k_TKH, v_TKH = (x.flatten(0, 1) for x in (q_BSNH, k_BSKH, v_BSKH))
    if p == 0.0 and varlen_refuses(q_TNH.device, q_TNH.dtype, q_TNH.shape[-1]) is None:
        out_TNH = _varlen(q_TNH, k_TKH, v_TKH, causal, scale, documents, window)
    else:
        out_TNH = _by_length(q_TNH, k_TKH, v_TKH, causal, scale, documents, window, p)
    return out_TNH.unflatten(0, (rows, -1))


@cache
def _varlen_options() -> frozenset[str] | None:
    """Options of this torch's `varlen_attn`; None: it has none that scales and is causal."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = frozenset(inspect.signature(varlen_attn).parameters)
    return options if {"scale", "window_size"} <= options else None


def varlen_refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why torch's variable-length kernel cannot run."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "torch's variable-length kernel takes bf16 and fp16 on a CUDA device"
    if head_dim % 8 or head_dim > _WIDEST_HEAD:
        return f"torch's variable-length kernel takes multiples of 8 up to {_WIDEST_HEAD}, not {head_dim}"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "torch's variable-length kernel needs compute capability 8.0"
    return None if _varlen_options() is not None else "torch's variable-length kernel has no causal mask here"


def _varlen(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    causal: bool,
    scale: float | None,
    documents: Documents,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    reach = -1 if window is None else window - 1
    options: dict[str, Any] = {"scale": scale, "window_size": (reach, 0) if causal else (reach, reach)}
    groups = q_TNH.shape[1] // k_TKH.shape[1]
    if groups > 1 and "enable_gqa" in (_varlen_options() or ()):
        options["enable_gqa"] = True
    elif groups > 1:
        k_TKH, v_TKH = (x.repeat_interleave(groups, dim=1) for x in (k_TKH, v_TKH))
    starts, longest = documents.starts, documents.longest
    return cast(Tensor, varlen_attn(q_TNH, k_TKH, v_TKH, starts, starts, longest, longest, **options))


def _by_length(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    causal: bool,
    scale: float | None,
    documents: Documents,
    window: int | None,
    p: float,
) -> Tensor:
    groups = q_TNH.shape[1] // k_TKH.shape[1]
    if groups > 1:
        # Not all fused backends have grouped heads, and math would hold the scores of the longest document.
        k_TKH, v_TKH = (x.repeat_interleave(groups, dim=1) for x in (k_TKH, v_TKH))
    order_T, sizes = _sorted_by_length(documents)
    if len(sizes) > 1:
        order_T = order_T.to(q_TNH.device, non_blocking=True)
        back_T = torch.argsort(order_T)
        q_TNH, k_TKH, v_TKH = (_permute(x, order_T, back_T) for x in (q_TNH, k_TKH, v_TKH))
    tokens = [count * length for length, count in sizes]
    found = []
    for (length, _), *parts in zip(sizes, *(x.split(tokens) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in parts)
        mask = None if window is None else band(length, window, causal, q.device)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal and mask is None, scale=scale
        )
        found.append(out.transpose(1, 2).flatten(0, 1))
    return found[0] if len(sizes) == 1 else _permute(torch.cat(found), back_T, order_T)


def _sorted_by_length(documents: Documents) -> tuple[Tensor, list[tuple[int, int]]]:
    """Positions with the shortest documents first, int64 (T,) in the host's memory, and (length, how many), rising."""
    starts = (documents.starts if documents.host is None else documents.host).cpu().long()
    lengths, by_length = starts.diff().sort(stable=True)
    shifts = starts[by_length] - (lengths.cumsum(0) - lengths)
    order_T = torch.arange(int(starts[-1])) + shifts.repeat_interleave(lengths)
    found, counts = lengths.unique_consecutive(return_counts=True)
    return order_T, list(zip(found.tolist(), counts.tolist(), strict=True))


class _Permutation(torch.autograd.Function):
    """Its adjoint is the permutation back, which needs no sums as the one of a gather does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return cast(Tensor, _Permutation.apply(grads[0], back, order)), None, None


def _permute(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    return cast(Tensor, _Permutation.apply(x, order, back))
