"""Cases of attention: every mask, head dim, ratio of heads and dtype, with the formula written out as the baseline."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from engine_kernels.documents import Documents
from engine_kernels.reference.attention import AttentionDropout, band
from engine_kernels.reference.dropout import attention_keys, dropout, row_keys
from tests.helpers.twice import assert_twice_as_good

LENGTHS = (1, 7, 41, 113, 123)
KINDS = ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float16, 96))
"""Dtypes and head dims of random cases, few because each is compiled for every mask."""


class _Fused(torch.autograd.Function):
    """Attention, heads first, as fused kernels do it.

    The backward pass computes the weights anew from the scores and the logarithm of their sum, and takes the mean of
    the weights' gradients from the rounded output.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, kept: Tensor, scale: float) -> Tensor:
        scores = ((q @ k.transpose(-1, -2)).float() * scale).masked_fill(hidden, float("-inf"))
        # Of base 2, as their hardware's exponentials.
        scores = scores * math.log2(math.e)
        lse = scores.exp2().sum(-1, keepdim=True).log2()
        weights = (scores - lse).exp2().to(q.dtype)
        out = (weights * kept) @ v
        ctx.save_for_backward(q, k, v, weights, kept, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, kept, out = ctx.saved_tensors
        do = grads[0]
        mean = (do.float() * out.float()).sum(-1, keepdim=True)
        ds = (weights * ((do @ v.transpose(-1, -2)) * kept - mean)).to(q.dtype)
        dv = (weights * kept).transpose(-1, -2) @ do
        return (ds @ k) * ctx.scale, (ds.transpose(-1, -2) @ q) * ctx.scale, dv, None, None, None


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a case is made of; the same case has the same values everywhere."""

    length: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    heads: tuple[int, int] = (4, 4)
    batch: int = 2
    causal: bool = True
    mask: str = "none"
    """none, documents or padding."""
    window: int | None = None
    p: float = 0.0
    layout: str = "plain"
    """plain, fused (parts of one tensor) or heads_first."""
    seed: int = 0

    @cached_property
    def lengths(self) -> list[list[int]]:
        """Lengths of the documents of each row; with padding the first is what is real."""
        chance = random.Random(self.seed)
        found = []
        for _ in range(self.batch):
            cuts = sorted(chance.sample(range(1, self.length), min(3, self.length - 1)))
            edges = [0, *cuts[: 1 if self.mask == "padding" else 3], self.length]
            found.append([end - start for start, end in zip(edges, edges[1:], strict=False)])
        return found

    def options(self) -> dict[str, Any]:
        """Keyword arguments of an implementation."""
        found: dict[str, Any] = {"causal": self.causal, "window": self.window}
        flat = [length for row in self.lengths for length in row]
        if self.mask == "documents":
            starts = torch.tensor([0, *flat]).cumsum(0).int()
            found["documents"] = Documents(starts, max(flat)).to(self.device)
        elif self.mask == "padding":
            found["lengths_B"] = torch.tensor([row[0] for row in self.lengths], device=self.device)
        if self.p:
            found["dropout"] = AttentionDropout(p=self.p, seed=3, keys=self._keys)
        return found

    def _keys(self) -> Tensor:
        samples, positions = (torch.arange(n, device=self.device) for n in (self.batch, self.length))
        return attention_keys(row_keys(5, 2, samples, positions), 1, self.heads[0])

    def visible(self) -> Tensor:
        """bool (B, S, S): queries by keys."""
        place = torch.arange(self.length)
        seen = (place[:, None] >= place) if self.causal else torch.ones(self.length, self.length, dtype=torch.bool)
        if self.window is not None:
            seen = seen & band(self.length, self.window, self.causal, seen.device)
        seen = seen.repeat(self.batch, 1, 1)
        for row, lengths in enumerate(self.lengths if self.mask != "none" else []):
            number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            seen[row] &= number[:, None] == number
        return seen.to(self.device)

    def values(self) -> list[Tensor]:
        """q, k, v and the gradient of the output, which is zero where the output means nothing."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [self.heads[0], self.heads[1], self.heads[1], self.heads[0]]
        shape = (self.batch, self.length, sum(sizes), self.head_dim)
        whole = (torch.randn(shape, generator=generator) * 1.3).to(self.device, self.dtype)
        if self.layout == "heads_first":
            parts = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in whole.split(sizes, 2)]
        else:
            parts = list(whole.split(sizes, 2))
        if self.layout == "plain":
            parts = [x.contiguous() for x in parts]
        if self.mask == "padding":
            parts[3] = parts[3].clone()
            for row, (real, *_) in enumerate(self.lengths):
                parts[3][row, real:] = 0.0
        return parts

    def formula(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(H)) v in the dtype of its arguments."""
        q, k, v = map(self._heads_first, (q, k, v))
        scores = (q @ k.transpose(-1, -2)) * self.head_dim**-0.5
        weights = scores.masked_fill(~self.visible()[:, None], float("-inf")).softmax(-1)
        if self.p:
            weights = dropout(weights, self._keys(), self.p)
        return (weights @ v).transpose(1, 2)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same with the backward pass of torch's fused kernels (arXiv 2307.08691, algorithm 2).

        Where few keys are seen, the mean of the weights' gradients and these cancel, and its rounding shows.
        """
        q, k, v = map(self._heads_first, (q, k, v))
        kept = torch.ones(len(q), q.shape[1], self.length, self.length, dtype=q.dtype, device=q.device)
        if self.p:
            kept = dropout(kept, self._keys(), self.p)
        out: Tensor = _Fused.apply(q, k, v, ~self.visible()[:, None], kept, self.head_dim**-0.5)
        return out.transpose(1, 2)

    def _heads_first(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).repeat_interleave(self.heads[0] // x.shape[2], 1)

    def real(self, x: Tensor) -> Tensor:
        """`x` (B, S, ...) with zeros where it means nothing."""
        if self.mask != "padding":
            return x
        x = x.clone()
        for row, (length, *_) in enumerate(self.lengths):
            x[row, length:] = 0.0
        return x


def forward_backward(fn: Callable[..., Tensor], values: list[Tensor], **options: Any) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in values[:3])
    out = fn(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3].to(out.dtype))]


def check(fn: Callable[..., Tensor], case: Case) -> None:
    """Output and gradients of `fn` err at most twice as much as torch's arithmetic in the same dtype."""
    values = case.values()
    found = forward_backward(fn, values, **case.options())
    exact = forward_backward(case.formula, [x.double() for x in values])
    plain, fused = forward_backward(case.formula, values), forward_backward(case.fused, values)
    for name, *tensors in zip(("out", "dq", "dk", "dv"), found, plain, fused, exact, strict=True):
        mine, *torchs, true = map(case.real, tensors)
        if name in ("dq", "dk") and float(true.abs().max()) < 1e-9:
            # One visible key: the gradient of its weight, which is 1, cancels out of terms of about this size.
            k, do = (values[i].double().abs() for i in (1, 3))
            size = (do.amax() * exact[0].abs().amax() * case.head_dim**0.5 * k.amax()) / (1 - case.p)
            assert float(mine.abs().max()) <= float(size) * torch.finfo(case.dtype).eps, f"{name} of {case}"
        else:
            worse = max(torchs, key=lambda x: float((x.double() - true).norm()))
            assert_twice_as_good(f"{name} of {case}", mine, worse, true)


def random_case(number: int, device: torch.device, lengths: tuple[int, ...] = LENGTHS) -> Case:
    """Case `number` of an endless list."""
    chance = random.Random(number)
    dtype, head_dim = KINDS[number % len(KINDS)]
    length = chance.choice(lengths)
    kv = chance.choice((1, 2, 4))
    return Case(
        length=length,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        heads=(4, kv),
        batch=chance.choice((1, 2)),
        causal=chance.random() < 0.5,
        mask=chance.choice(("none", "documents", "padding")) if length > 1 else "none",
        window=chance.choice((None, 1, 16, 50)),
        p=chance.choice((0.0, 0.3)),
        layout=chance.choice(("plain", "fused", "heads_first")),
        seed=number,
    )
