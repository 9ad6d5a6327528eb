"""Rotary positions: the reference against the engine's table, the Triton kernels against fp64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.model.rope import RotaryTable
from engine_kernels.reference import rotary as reference
from engine_kernels.triton import rotary
from tests.helpers.twice import assert_twice_as_good

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def table(positions: int, turned: int, device: torch.device) -> RotaryTable:
    return RotaryTable(positions, turned, 10000.0, device)


def turned_by(angles: RotaryTable, x_BSNH: Tensor, positions_BS: Tensor | None = None) -> Tensor:
    """By torch."""
    return reference.rotate(x_BSNH, angles.cos_SR, angles.sin_SR, positions_BS)


def qkv(
    batch: int, length: int, heads: tuple[int, int], width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A fused tensor (B, S, (N + 2K) H) that wants gradients, and q and k as views of it."""
    torch.manual_seed(length)
    n, k = heads
    fused = torch.randn(batch, length, (n + 2 * k) * width).to(dtype).to(device).requires_grad_()
    parts = fused.split((n * width, k * width, k * width), dim=-1)
    q_BSNH, k_BSKH, _ = (part.unflatten(-1, (-1, width)) for part in parts)
    return fused, q_BSNH, k_BSKH


# Batch, length, (N, K), H, R, dtype, positions given.
CASES = [
    (2, 7, (3, 1), 8, 8, FP32, True),
    (1, 41, (4, 2), 64, 64, BF16, False),
    (2, 41, (2, 2), 96, 24, BF16, True),
    (1, 113, (1, 1), 10, 6, FP16, True),
    (1, 3, (33, 7), 128, 128, BF16, True),
    (1, 7, (40, 40), 32, 30, FP32, False),
    (7, 1, (2, 1), 2, 2, FP32, True),
]


@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "turned", "dtype", "given"), CASES, ids=lambda v: str(v).split(".")[-1]
)
def test_error_is_at_most_twice_the_tables(
    batch: int,
    length: int,
    heads: tuple[int, int],
    width: int,
    turned: int,
    dtype: torch.dtype,
    given: bool,
    device: torch.device,
) -> None:
    """Values and the gradient of the fused tensor; and `rotate` finds what `rotate_qk` does."""
    angles = table(123, turned, device)
    positions_BS = torch.randint(123, (batch, length), device=device) if given else None
    tables = (angles.cos_SR, angles.sin_SR, positions_BS)
    fused, q_BSNH, k_BSKH = qkv(batch, length, heads, width, dtype, device)
    found = rotary.rotate_qk(q_BSNH, k_BSKH, *tables)
    grads = [torch.randn_like(x) for x in found]
    found += torch.autograd.grad(found, fused, grads)
    baseline = [turned_by(angles, x, positions_BS) for x in (q_BSNH, k_BSKH)]
    baseline += torch.autograd.grad(baseline, fused, grads)
    wide = [x.detach().double().requires_grad_() for x in (q_BSNH, k_BSKH)]
    exact = [reference.rotate(x, *tables) for x in wide]
    dq, dk = torch.autograd.grad(exact, wide, [g.double() for g in grads])
    exact.append(torch.cat([dq.flatten(2), dk.flatten(2), torch.zeros_like(dk).flatten(2)], dim=-1))
    for name, *values in zip(("q", "k", "fused"), found, baseline, exact, strict=True):
        assert_twice_as_good(name, *(value.detach() for value in values))
    assert found[0].is_contiguous() and found[1].is_contiguous()
    for x, turned_x in zip((q_BSNH, k_BSKH), found, strict=False):
        assert torch.equal(rotary.rotate(x, *tables), turned_x)
        assert torch.equal(turned_x[..., turned:], x[..., turned:])


def test_views_are_read_where_they_are(device: torch.device) -> None:
    _, q_BSNH, k_BSKH = qkv(2, 7, (4, 2), 8, BF16, device)
    for x in (q_BSNH, k_BSKH, q_BSNH.transpose(1, 2), k_BSKH[:, ::2]):
        assert not x.is_contiguous()
        assert rotary._readable(x) is x


def test_any_strides(device: torch.device) -> None:
    angles = table(41, 8, device)
    torch.manual_seed(0)
    x_BSNH = torch.randn(2, 7, 3, 8, device=device)
    expected = rotary.rotate(x_BSNH, angles.cos_SR, angles.sin_SR)
    for order in ((1, 0, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)):
        view = x_BSNH.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
        assert not view.is_contiguous()
        assert torch.equal(rotary.rotate(view, angles.cos_SR, angles.sin_SR), expected)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in (angles.cos_SR, angles.sin_SR)]
    assert torch.equal(rotary.rotate(x_BSNH, *strided), expected)
    positions_BS = torch.arange(7, device=device).expand(2, 7)
    assert torch.equal(rotary.rotate(x_BSNH, angles.cos_SR, angles.sin_SR, positions_BS), expected)
    x = x_BSNH.clone().requires_grad_()
    rotary.rotate(x, angles.cos_SR, angles.sin_SR).sum().backward()  # a gradient with strides of zero
    torch.testing.assert_close(x.grad, rotary._rotate(torch.ones_like(x), angles.cos_SR, angles.sin_SR, None, True))


def test_positions_outside_of_the_table_are_nan(device: torch.device) -> None:
    angles = table(41, 4, device)
    x_BSNH = torch.randn(1, 6, 2, 6, device=device)
    positions_BS = torch.tensor([[0, 41, 40, -1, 2**40, 3]], device=device)
    found = rotary.rotate(x_BSNH, angles.cos_SR, angles.sin_SR, positions_BS)
    inside = [0, 2, 5]
    expected = turned_by(angles, x_BSNH[:, inside], positions_BS[:, inside])
    torch.testing.assert_close(found[:, inside], expected)
    assert bool(found[:, [1, 3, 4], :, :4].isnan().all())
    assert torch.equal(found[..., 4:], x_BSNH[..., 4:])


def test_nan_stays_in_its_pair(device: torch.device) -> None:
    angles = table(41, 8, device)
    x_BSNH = torch.randn(1, 5, 2, 8, device=device)
    x_BSNH[0, 3, 1, 2] = float("nan")
    found = rotary.rotate(x_BSNH, angles.cos_SR, angles.sin_SR)
    assert found.isnan().nonzero().tolist() == [[0, 3, 1, 2], [0, 3, 1, 6]]


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
def test_nothing_to_turn(shape: tuple[int, ...], device: torch.device) -> None:
    angles = table(41, 8, device)
    x = torch.randn(shape, device=device, requires_grad=True)
    out = rotary.rotate(x, angles.cos_SR, angles.sin_SR)
    out.sum().backward()
    assert out.shape == shape and x.grad is not None and x.grad.shape == shape


def test_queries_without_keys(device: torch.device) -> None:
    angles = table(41, 8, device)
    q_BSNH, none = torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 5, 0, 8, device=device)
    q, k = rotary.rotate_qk(q_BSNH, none, angles.cos_SR, angles.sin_SR)
    assert torch.equal(q, rotary.rotate(q_BSNH, angles.cos_SR, angles.sin_SR)) and k.shape == none.shape


def test_only_queries_get_gradients(device: torch.device) -> None:
    angles = table(41, 8, device)
    fused, q_BSNH, k_BSKH = qkv(1, 7, (2, 1), 8, FP32, device)
    q, _ = rotary.rotate_qk(q_BSNH, k_BSKH, angles.cos_SR, angles.sin_SR)
    expected = torch.autograd.grad(turned_by(angles, q_BSNH).sum(), fused, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(q.sum(), fused), expected)


def test_compiles_into_one_graph(device: torch.device) -> None:
    angles = table(41, 8, device)
    positions_BS = torch.randint(41, (2, 7), device=device)

    def both(fused: Tensor) -> Tensor:
        q, k, _ = (part.unflatten(-1, (-1, 8)) for part in fused.split((16, 8, 8), dim=-1))
        turned = rotary.rotate_qk(q, k, angles.cos_SR, angles.sin_SR, positions_BS)
        return torch.cat([*turned, rotary.rotate(q, angles.cos_SR, angles.sin_SR)], dim=2).square()

    fused, _, _ = qkv(2, 7, (2, 1), 8, FP32, device)
    results = []
    for call in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        out = call(fused)
        results.append((out, *torch.autograd.grad(out.sum(), fused)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_say_what_they_return(device: torch.device) -> None:
    angles = table(41, 8, device)
    _, q_BSNH, k_BSKH = (x.detach() for x in qkv(2, 7, (2, 1), 8, BF16, device))
    tables = (angles.cos_SR, angles.sin_SR, None, False)
    for operator, arguments in ((rotary._rotate, (q_BSNH, *tables)), (rotary._rotate_qk, (q_BSNH, k_BSKH, *tables))):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_reference_gradients() -> None:
    angles = table(41, 4, torch.device("cpu"))
    positions_BS = torch.randint(41, (1, 3))
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.rotate(x, angles.cos_SR, angles.sin_SR, positions_BS), x)


def refused(module: ModuleType, device: torch.device, **change: Any) -> str:
    angles = table(41, 8, device)
    given: dict[str, Any] = {
        "q_BSNH": torch.ones(2, 5, 3, 8, device=device),
        "k_BSKH": torch.ones(2, 5, 1, 8, device=device),
        "cos_SR": angles.cos_SR,
        "sin_SR": angles.sin_SR,
    }
    with pytest.raises(ValueError) as error:
        module.rotate_qk(**(given | change))
    return str(error.value)


@pytest.mark.parametrize("module", [rotary, reference])
def test_refusals(module: ModuleType, device: torch.device) -> None:
    def ones(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    here = ones(1).device
    with pytest.raises(ValueError, match=r"^x_BSNH has shape \(5, 8\): must have four dimensions, \(B, S, heads, H\)$"):
        module.rotate(ones(5, 8), ones(41, 4), ones(41, 4))
    with pytest.raises(ValueError, match=r"^x_BSNH is torch\.int64: must be floating$"):
        module.rotate(ones(1, 5, 1, 8, dtype=torch.int64), ones(41, 4), ones(41, 4))
    heads = ": must be that of q_BSNH, (2, 5, 3, 8), but for the number of heads"
    tables = ": must be fp32 (positions, R/2) with 2 <= R <= H, and H of q_BSNH is 8"
    for change, message in [
        ({"k_BSKH": ones(2, 5, 8)}, "k_BSKH has shape (2, 5, 8)" + heads),
        ({"k_BSKH": ones(2, 5, 1, 6)}, "k_BSKH has shape (2, 5, 1, 6)" + heads),
        ({"k_BSKH": ones(2, 5, 1, 8, dtype=BF16)}, f"k_BSKH is {BF16}: must be of the dtype of q_BSNH, {FP32}"),
        ({"cos_SR": ones(41, 5)}, "cos_SR is torch.float32 of shape (41, 5)" + tables),
        ({"cos_SR": ones(41, 0)}, "cos_SR is torch.float32 of shape (41, 0)" + tables),
        ({"cos_SR": ones(41, 4, dtype=BF16)}, "cos_SR is torch.bfloat16 of shape (41, 4)" + tables),
        ({"cos_SR": ones(4)}, "cos_SR is torch.float32 of shape (4,)" + tables),
        ({"sin_SR": ones(41, 3)}, "sin_SR has shape (41, 3): must be that of cos_SR, (41, 4)"),
        (
            {"sin_SR": ones(41, 4, dtype=FP16)},
            "sin_SR is torch.float16: must be of the dtype of cos_SR, torch.float32",
        ),
        (
            {"cos_SR": ones(41, 4).to("meta"), "sin_SR": ones(41, 4).to("meta")},
            f"cos_SR is on meta: must be on the device of q_BSNH, {here}",
        ),
        ({"cos_SR": ones(4, 4), "sin_SR": ones(4, 4)}, "q_BSNH has 5 positions: the tables have rows for 4"),
        (
            {"positions_BS": ones(2, 5, dtype=torch.int32)},
            "positions_BS is torch.int32 of shape (2, 5): must be int64 (B, S), here (2, 5)",
        ),
        (
            {"positions_BS": ones(5, dtype=torch.int64)},
            "positions_BS is torch.int64 of shape (5,): must be int64 (B, S), here (2, 5)",
        ),
        (
            {"positions_BS": ones(2, 5, dtype=torch.int64).to("meta")},
            f"positions_BS is on meta: must be on the device of q_BSNH, {here}",
        ),
    ]:
        assert refused(module, device, **change) == message


def test_triton_refuses_more(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    double = {"q_BSNH": torch.ones(2, 5, 3, 8, device=device).double()}
    double["k_BSKH"] = double["q_BSNH"]
    message = "q_BSNH is torch.float64: Triton kernels take fp32, bf16 and fp16"
    assert refused(rotary, device, **double) == message
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = "q_BSNH is on cpu: Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set"
    assert refused(rotary, torch.device("cpu")) == message
