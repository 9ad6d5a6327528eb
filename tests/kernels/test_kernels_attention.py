"""FlashAttention in Triton against the formula: every mask, dtype, head dim and length, gradients too."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_kernels.reference.attention import AttentionDropout
from engine_kernels.triton import attention as module
from engine_kernels.triton.attention import attention
from tests.helpers.attending import Case, check, forward_backward, random_case

NATIVE = torch.cuda.is_available()
CASES = int(os.environ.get("OCTANT_KERNEL_CASES", 64 if NATIVE else 24))


@pytest.mark.parametrize("number", range(CASES))
def test_random_cases_are_as_near_as_the_formula(number: int, device: torch.device) -> None:
    check(attention, random_case(number, device, (1, 7, 41, 113, 123, 1000) if NATIVE else (1, 7, 41, 113)))


@pytest.mark.parametrize("head_dim", [8, 32, 33, 40, 80, 160, 192, 256])
def test_every_head_dim(head_dim: int, device: torch.device) -> None:
    dtype = (torch.float32, torch.bfloat16, torch.float16)[head_dim % 3]
    check(attention, Case(length=70, head_dim=head_dim, dtype=dtype, device=device, heads=(2, 1), batch=1))


@pytest.mark.parametrize("causal", [True, False])
def test_long_rows_of_short_documents(causal: bool, device: torch.device) -> None:
    case = Case(length=300, head_dim=32, dtype=torch.float32, device=device, heads=(1, 1), mask="documents")
    check(attention, replace(case, causal=causal))


def test_one_query_head_and_rows_of_one_block(device: torch.device) -> None:
    check(attention, Case(length=64, head_dim=64, dtype=torch.float16, device=device, heads=(1, 1), batch=1))


def test_it_repeats_itself_to_the_bit(device: torch.device) -> None:
    case = Case(length=123, head_dim=64, dtype=torch.bfloat16, device=device, heads=(4, 2))
    first, second = (forward_backward(attention, case.values(), **case.options()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_left_unwritten(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers come full of NaN, and what lies beside a view is NaN too."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: Any, original: Any = original, **options: Any) -> Tensor:
            x: Tensor = original(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(2**30))

        monkeypatch.setattr(torch, name, poisoned)
    monkeypatch.setattr(
        module, "_vectors", lambda q: q.new_full((*q.shape[:1], q.shape[2], q.shape[1]), torch.nan).float()
    )
    case = Case(length=41, head_dim=40, dtype=torch.float32, device=device, mask="documents")
    wide = [torch.full((*x.shape[:3], 48), float("nan"), dtype=x.dtype, device=device) for x in case.values()]
    for x, value in zip(wide, case.values(), strict=True):
        x[..., :40] = value
    found = forward_backward(attention, [x[..., :40] for x in wide], **case.options())
    assert all(bool(x.isfinite().all()) for x in found)


def test_nan_goes_to_who_sees_it_and_to_no_other_head_or_row(device: torch.device) -> None:
    case = Case(length=41, head_dim=32, dtype=torch.float32, device=device, heads=(2, 2))
    q, k, v, _ = case.values()
    v = v.clone()
    v[0, 20, 0] = float("nan")
    out = attention(q, k, v, causal=True)
    hit = out.isnan().any(-1)
    assert hit[0, 20:, 0].all() and not hit[0, :, 1].any() and not hit[1].any()


@pytest.mark.parametrize("shape", [(0, 5, 2, 32), (2, 0, 2, 32)])
def test_empty_inputs_give_empty_outputs(shape: tuple[int, ...], device: torch.device) -> None:
    values = [torch.zeros(shape, device=device) for _ in range(4)]
    for x in forward_backward(attention, values, causal=True):
        assert x.shape == shape


def test_the_scale_is_that_of_the_scores(device: torch.device) -> None:
    case = Case(length=41, head_dim=32, dtype=torch.float32, device=device)
    values = case.values()
    scaled = forward_backward(attention, values, causal=True, scale=0.5)
    other = forward_backward(attention, [values[0] * (0.5 * 32**0.5), *values[1:]], causal=True)
    torch.testing.assert_close(scaled[0], other[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_it_compiles_without_a_break(p: float, device: torch.device) -> None:
    case = Case(length=41, head_dim=32, dtype=torch.float32, device=device, p=p)
    keys = case._keys()

    def doubled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        drop = AttentionDropout(p=p, seed=0, keys=lambda: keys) if p else None
        return attention(q * 2, k, v, causal=True, dropout=drop) + 1

    compiled = torch.compile(doubled, fullgraph=True, backend="inductor" if NATIVE else "aot_eager")
    for mine, other in zip(
        forward_backward(compiled, case.values()), forward_backward(doubled, case.values()), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def wrong(message: str, **changes: Any) -> Any:
    return pytest.param(changes, message, id=message[:24].replace(" ", "_"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        wrong("q_BSNH has shape (5, 2, 32): attention takes (batch, sequence, heads, head dim)", q=(5, 2, 32)),
        wrong("k_BSKH (2, 6, 2, 32) and v_BSKH (2, 5, 2, 32) do not go with q_BSNH (2, 5, 2, 32)", k=(2, 6, 2, 32)),
        wrong("k_BSKH has 3 heads, which do not divide the 2 of q_BSNH", k=(2, 5, 3, 32), v=(2, 5, 3, 32)),
        wrong(
            "q_BSNH has head dim 257: attention in Triton takes 1 to 256",
            q=(1, 1, 1, 257),
            k=(1, 1, 1, 257),
            v=(1, 1, 1, 257),
        ),
        wrong(
            "q_BSNH is torch.float64: attention in Triton takes bf16, fp16 or fp32, the same for q, k, v",
            dtype=torch.float64,
        ),
        wrong("window is 0: a query sees at least itself, so it is 1 or more", window=0),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, device: torch.device) -> None:
    shape, dtype = (2, 5, 2, 32), changes.get("dtype", torch.float32)
    q, k, v = (torch.zeros(changes.get(name, shape), device=device, dtype=dtype) for name in "qkv")
    with pytest.raises(ValueError) as caught:
        attention(q, k, v, causal=True, window=changes.get("window"))
    assert str(caught.value) == message


def test_other_devices_are_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q = torch.zeros(1, 1, 1, 32)
    with pytest.raises(
        ValueError, match="q_BSNH is on cpu: Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set"
    ):
        attention(q, q, q, causal=True)
