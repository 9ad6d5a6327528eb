"""Documents that share rows: each is what it is alone, and nothing as large as a row's scores is made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from engine_kernels import packed
from engine_kernels.ops import AttentionDropout, AttentionFn, Documents, attention_keys, row_keys, sdpa_attention
from engine_kernels.reference.attention import attention as reference

B, S, N, H = 2, 41, 6, 8
IMPLEMENTATIONS = [reference, sdpa_attention]
PACKINGS = {
    "odd lengths": [[7, 13, 21], [3, 38]],
    "documents of one token": [[1, 1, 38, 1], [20, 1, 20]],
    "one document a row": [[41], [41]],
    "one token each": [[1] * 41, [1] * 41],
    "equal lengths out of order": [[5, 11, 5, 9, 11], [9, 5, 11, 5, 11]],
}
packings = pytest.mark.parametrize("lengths", PACKINGS.values(), ids=list(PACKINGS))


def documents(lengths: list[list[int]]) -> Documents:
    flat = [length for row in lengths for length in row]
    return Documents(torch.tensor([0, *flat]).cumsum(0).int(), max(flat))


def inputs(kv: int, dtype: torch.dtype, length: int = S) -> list[Tensor]:
    """Query, key and value, and a gradient of the output; far from uniform attention."""
    generator = torch.Generator().manual_seed(kv)
    sizes = [(B, length, heads, H) for heads in (N, kv, kv, N)]
    return [(torch.randn(size, generator=generator, dtype=torch.float64) * 1.5).to(dtype) for size in sizes]


def forward_backward(fn: AttentionFn, values: list[Tensor], **options: Any) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in values[:3])
    out = fn(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3].to(out.dtype))]


def alone(values: list[Tensor], lengths: list[list[int]], causal: bool) -> list[Tensor]:
    """Output and gradients of each document cut out of its row, put together again."""
    found = [torch.zeros_like(x) for x in (values[3], *values[:3])]
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            here = slice(start, start + length)
            part = forward_backward(reference, [x[row : row + 1, here] for x in values], causal=causal)
            for whole, piece in zip(found, part, strict=True):
                whole[row, here] = piece[0]
            start += length
    return found


@packings
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv", [6, 3, 1])
@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_each_document_is_what_it_is_alone(fn: AttentionFn, kv: int, causal: bool, lengths: list[list[int]]) -> None:
    values = inputs(kv, torch.float64)
    found = forward_backward(fn, values, causal=causal, documents=documents(lengths), scale=1 / math.sqrt(H))
    for name, mine, other in zip(("out", "q", "k", "v"), found, alone(values, lengths, causal), strict=True):
        # fp64 rounding over at most 41 positions; values are below 20.
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lengths", [PACKINGS["odd lengths"], PACKINGS["documents of one token"]])
@pytest.mark.parametrize("kv", [6, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_it_is_as_near_to_fp64_as_torch_in_the_same_dtype(
    fn: AttentionFn, dtype: torch.dtype, kv: int, lengths: list[list[int]]
) -> None:
    seen = torch.ones(S, S, dtype=torch.bool).tril().repeat(B, 1, 1)
    for row, parts in enumerate(lengths):
        number = torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))
        seen[row] &= number[:, None] == number

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(N // kv, 2) for x in (k, v))))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None]).transpose(1, 2)

    values = inputs(kv, dtype)
    exact = alone([x.double() for x in values], lengths, causal=True)
    baseline = forward_backward(masked, values)  # type: ignore[arg-type]
    found = forward_backward(fn, values, causal=True, documents=documents(lengths))
    for name, mine, other, expected in zip(("out", "q", "k", "v"), found, baseline, exact, strict=True):
        assert mine.dtype is dtype
        error, allowed = (float((x.double() - expected).abs().max()) for x in (mine, other))
        # flash-attention's rule, against torch's operation with a mask over the row in the same dtype.
        assert error <= 2 * allowed, name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_the_gradient_is_that_of_finite_differences(fn: AttentionFn, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 5, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    held = documents([[2, 3], [4, 1]])
    assert torch.autograd.gradcheck(lambda *x: fn(*x, causal=causal, scale=0.7, documents=held), (q, k, v))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kv", [6, 3])
def test_nothing_as_large_as_a_mask_over_a_row_is_made(kv: int, dtype: torch.dtype, dropped: bool) -> None:
    length = 512
    values, lengths = inputs(kv, dtype, length), [[32] * 16, [10, 9, 13, *[32] * 13, 31, 33]]
    how = AttentionDropout(p=0.1, seed=1, keys=lambda: torch.empty(0)) if dropped else None
    with Largest() as made:
        forward_backward(sdpa_attention, values, causal=True, documents=documents(lengths), dropout=how)
    assert B * length * N * H <= made.elements < length * length, "inputs are seen, a mask is not there"
    with Largest() as made:
        forward_backward(reference, values, causal=True, documents=documents(lengths))
    assert made.elements >= length * length, "the measurement finds it in the reference"


def drop(seed: int = 1) -> AttentionDropout:
    def keys() -> Tensor:
        return attention_keys(row_keys(seed, 0, torch.arange(B), torch.arange(S)), 0, N)

    return AttentionDropout(p=0.25, seed=seed, keys=keys)


@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_a_recomputation_drops_the_same_weights(fn: AttentionFn) -> None:
    values = [x.requires_grad_() for x in inputs(3, torch.float64)[:3]]
    held = documents(PACKINGS["odd lengths"])

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fn(q, k, v, causal=True, dropout=drop(), documents=held).square()

    plain = torch.autograd.grad(layer(*values).sum(), values)
    out = checkpoint(layer, *values, use_reentrant=False, preserve_rng_state=False)
    torch.rand(3)  # moves the outer generator before the second run
    for mine, other in zip(torch.autograd.grad(out.sum(), values), plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-15)


@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_dropped_weights_are_zero_and_the_others_scaled(fn: AttentionFn) -> None:
    # Equal scores in documents of 8 and one-hot values: the output is the weights.
    zeros = torch.zeros(B, 40, N, 8, dtype=torch.float64)
    one_hot = torch.eye(8, dtype=torch.float64).repeat(5, 1)[None, :, None].expand(B, 40, N, 8)
    held = documents([[8] * 5, [8] * 5])
    found = torch.stack(
        [fn(zeros, zeros, one_hot, causal=False, dropout=dropping(seed), documents=held) for seed in range(20)]
    )
    kept = found > 0
    torch.testing.assert_close(found, kept.double() / (0.75 * 8), rtol=0, atol=1e-12)
    # A binomial count lies further than five standard deviations out once in 2e6 times.
    assert abs(float(kept.sum()) - 0.75 * kept.numel()) < 5 * (0.75 * 0.25 * kept.numel()) ** 0.5


def dropping(seed: int) -> AttentionDropout:
    positions = torch.arange(40)
    return AttentionDropout(
        p=0.25, seed=seed, keys=lambda: attention_keys(row_keys(seed, 0, torch.arange(B), positions), 0, N)
    )


def test_other_documents_need_no_other_graph() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, held: Documents) -> Tensor:
        return sdpa_attention(q * 2, k, v, causal=True, documents=held) * 3

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter)
    q, k, v, _ = inputs(3, torch.float64)
    graphs = []
    for lengths in PACKINGS.values():
        found = compiled(q, k, v, documents(lengths))
        torch.testing.assert_close(found, layer(q, k, v, documents(lengths)), rtol=0, atol=1e-12)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[1:] == graphs[:1] * (len(PACKINGS) - 1)


def test_positions_and_numbers_of_documents() -> None:
    held = documents([[2, 3], [1, 4]])
    assert held.numbers(2, 5).tolist() == [[0, 0, 1, 1, 1], [2, 3, 3, 3, 3]]
    assert held.positions(2, 5).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]


def test_documents_on_a_device_keep_their_lengths_at_the_host() -> None:
    held = documents([[2, 3], [1, 4]])
    moved = held.to(torch.device("meta"))
    assert moved.starts.device.type == "meta"
    assert moved.host is held.starts
    assert moved.to(torch.device("meta")).host is held.starts
    assert moved.longest == 4


@pytest.mark.parametrize("grouped", [True, False], ids=["torch 2.12", "torch 2.11"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_flash_kernel_is_asked_for_each_document(
    monkeypatch: pytest.MonkeyPatch, causal: bool, grouped: bool
) -> None:
    """Its arguments, as the documentation of `varlen_attn` has them; the kernel itself needs a GPU."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert enable_gqa or query.shape[1] == key.shape[1], "heads are told to be grouped or are equal in number"
        assert (cu_seq_q.dtype, cu_seq_k.dtype) == (torch.int32, torch.int32)
        assert max_q == max_k == int(cu_seq_q.diff().max())
        out = torch.empty_like(query)
        for start, stop in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
            parts = (x[None, start:stop] for x in (query, key, value))
            out[start:stop] = reference(*parts, causal=window_size == (-1, 0), scale=scale)[0]
        return out

    def older(*args: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        return kernel(*args, scale=scale, window_size=window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel if grouped else older)
    monkeypatch.setattr(packed, "varlen_refuses", lambda device, dtype, head_dim: None)
    packed._varlen_options.cache_clear()
    q, k, v, _ = inputs(2, torch.float64)
    held = documents(PACKINGS["odd lengths"])
    found = sdpa_attention(q, k, v, causal=causal, scale=0.4, documents=held)
    packed._varlen_options.cache_clear()
    torch.testing.assert_close(found, reference(q, k, v, causal=causal, scale=0.4, documents=held), rtol=0, atol=1e-12)
