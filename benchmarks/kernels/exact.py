"""Attention and its gradients in fp32 for one key/value head of one row: what all systems are judged by.

Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim, G = N / K query heads of a key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.kernels.contest import Judge, Unavailable, accepted, apart
from engine_kernels.documents import Documents

_SCORES = 2**26
"""Elements of the scores that are held at a time."""
LIMIT = 0.02
"""Of ||x - exact|| / ||exact||: bf16 rounds to 2^-9, and gradients add up several roundings."""
WORST_LIMIT = 0.1
"""The same for the worst position, whose norm counts for at least the root mean square of all."""


def last_head(
    q_BSNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, dout_BSNH: Tensor, *, causal: bool, documents: Documents | None
) -> tuple[Tensor, ...]:
    """Output (S,G,H) and gradients by q (S,G,H), k and v (S,H) of the last key/value head in the last row."""
    groups, length = q_BSNH.shape[2] // k_BSKH.shape[2], q_BSNH.shape[1]
    scale = q_BSNH.shape[-1] ** -0.5
    q, dout = (x[-1, :, -groups:].detach().transpose(0, 1).float() for x in (q_BSNH, dout_BSNH))
    k, v = (x[-1, :, -1].detach().float() for x in (k_BSKH, v_BSKH))
    number_S = None if documents is None else documents.numbers(q_BSNH.shape[0], length)[-1]
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    step = max(1, _SCORES // (groups * length))
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        columns = slice(0, rows.stop if causal else length)
        scores = q[:, rows] @ k[columns].T * scale
        hidden = torch.zeros(scores.shape[1:], dtype=torch.bool, device=q.device)
        if causal:
            hidden |= torch.ones_like(hidden).triu(start + 1)
        if number_S is not None:
            hidden |= number_S[rows, None] != number_S[None, columns]
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        out[:, rows] = weights @ v[columns]
        dv[columns] += (weights.transpose(1, 2) @ dout[:, rows]).sum(0)
        row_sums = (dout[:, rows] * out[:, rows]).sum(-1, keepdim=True)
        dscores = weights * (dout[:, rows] @ v[columns].T - row_sums) * scale
        dq[:, rows] = dscores @ k[columns]
        dk[columns] += (dscores.transpose(1, 2) @ q[:, rows]).sum(0)
    return out.transpose(0, 1), dq.transpose(0, 1), dk, dv


def worst_position(found: Tensor, exact: Tensor) -> float:
    """Largest error of a position, (S, ..., H), over its norm or the root mean square of all norms, if that is more."""
    errors, norms = ((x.float().norm(dim=-1)) for x in (found - exact, exact))
    return float((errors / norms.maximum(norms.square().mean().sqrt())).max())


def attention_judge(exact: Sequence[Tensor]) -> Judge:
    """Results are output and gradients by q, k and v, all (B,S,heads,H).

    One head is held against `exact`; the others against the first system that passed.
    """
    groups = exact[0].shape[1]
    first: list[Tensor] = []

    def judge(results: Sequence[Tensor]) -> dict[str, float]:
        if len(results) != 4:
            raise Unavailable(f"wrong result: {len(results)} tensors, not 4")
        out, dq, dk, dv = results
        slices = (out[-1, :, -groups:], dq[-1, :, -groups:], dk[-1, :, -1], dv[-1, :, -1])
        pairs = list(zip(slices, exact, strict=True))
        errors = {
            "error": accepted([apart(one, other) for one, other in pairs], LIMIT),
            "error_worst_position": accepted([worst_position(one, other) for one, other in pairs], WORST_LIMIT),
        }
        if first:
            found = [apart(one, other) for one, other in zip(results, first, strict=True)]
            errors["apart_from_first"] = accepted(found, 2 * LIMIT)
        else:
            first.extend(results)
        return errors

    return judge
