"""RMSNorm and LayerNorm: the references against torch, the Triton kernels against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine_kernels.reference import norm as reference
from engine_kernels.triton import layer_norm as layer_norm_module
from engine_kernels.triton import rms_norm as rms_norm_module
from engine_kernels.triton import rows
from engine_kernels.triton.layer_norm import layer_norm
from engine_kernels.triton.rms_norm import rms_norm
from tests.helpers.twice import assert_twice_as_good

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def torch_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, kind: str, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    s = x if residual is None else x + residual
    if kind == "rms":
        y = F.rms_norm(s, weight_D.shape, weight_D, EPS)
    else:
        y = F.layer_norm(s, weight_D.shape, weight_D, bias_D, EPS)
    return y if residual is None else (y, s)


def ours(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, kind: str, residual: Tensor | None) -> Any:
    if kind == "rms":
        return rms_norm(x, weight_D, eps=EPS, residual=residual)
    return layer_norm(x, weight_D, bias_D, eps=EPS, residual=residual)


def plain(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, kind: str, residual: Tensor | None) -> Any:
    if kind == "rms":
        return reference.rms_norm(x, weight_D, eps=EPS, residual=residual)
    return reference.layer_norm(x, weight_D, bias_D, eps=EPS, residual=residual)


def inputs(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, residual: bool, bias: bool
) -> Results:
    """The arguments and gradients of the outputs, from one seed. Rows have a mean."""
    torch.manual_seed(len(shape) + shape[-1])
    found = {"x": torch.randn(shape) + 0.5, "weight_D": torch.randn(shape[-1]) + 1, "dy": torch.randn(shape)}
    if kind == "layer" and bias:
        found["bias_D"] = torch.randn(shape[-1])
    if residual:
        found["residual"], found["ds"] = torch.randn(shape), torch.randn(shape)
    return {name: value.to(dtype).to(device) for name, value in found.items()}


def run(norm: Callable[..., Any], given: Results, kind: str, dtype: torch.dtype | None = None) -> Results:
    """Outputs and gradients of `norm` on `given`, cast to `dtype`."""
    leaves = {name: value.to(dtype or value.dtype).detach().requires_grad_() for name, value in given.items()}
    dy, ds = leaves.pop("dy").detach(), leaves.pop("ds", None)
    out = norm(leaves["x"], leaves["weight_D"], leaves.get("bias_D"), kind=kind, residual=leaves.get("residual"))
    outputs, grads = ((out,), (dy,)) if ds is None else (out, (dy, ds.detach()))
    found = dict(zip(("y", "s"), outputs, strict=False))
    derivatives = torch.autograd.grad(outputs, list(leaves.values()), grads)
    found |= zip((f"d{name}" for name in leaves), derivatives, strict=True)
    return {name: value.detach() for name, value in found.items()}


def check(given: Results, kind: str) -> None:
    exact, baseline = run(torch_norm, given, kind, torch.float64), run(torch_norm, given, kind)
    found = run(ours, given, kind)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.is_contiguous() or name.startswith("d"), name
        if name in ("dx", "dresidual") and value.shape[-1] == 1:
            # One channel is always normalised to itself: what is left of terms of this size is their rounding.
            size = (given["dy"] * given["weight_D"] / exact.get("s", given["x"])).abs().amax()
            assert float((value - exact[name]).abs().max()) <= 2 * float(size) * torch.finfo(value.dtype).eps, kind
            continue
        assert_twice_as_good(f"{kind} {name}", value, baseline[name], exact[name])
    if "s" in found:
        assert torch.equal(found["s"], baseline["s"])


# Programs of the interpreter have several tiles from 33 rows of 1000 on.
CASES = [
    ("rms", (2, 7, 41), FP32, False, False),
    ("rms", (2, 7, 41), BF16, True, False),
    ("rms", (123, 1000), BF16, True, False),
    ("rms", (41, 1000), FP16, False, False),
    ("rms", (113, 128), FP32, True, False),
    ("rms", (1, 1), FP32, True, False),
    ("layer", (2, 7, 41), FP32, True, True),
    ("layer", (2, 7, 41), BF16, False, False),
    ("layer", (41, 1000), BF16, True, True),
    ("layer", (41, 1000), FP32, False, True),
    ("layer", (41, 123), FP16, True, False),
    ("layer", (1000, 7), BF16, False, True),
]


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "residual", "bias"), CASES, ids=lambda v: str(v).removeprefix("torch.")
)
def test_error_is_at_most_twice_torchs(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, residual: bool, bias: bool, device: torch.device
) -> None:
    check(inputs(kind, shape, dtype, device, residual=residual, bias=bias), kind)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [8193, 16384])
def test_wide_rows(kind: str, width: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_SUM_COLUMNS", 4096)  # the interpreter is slow per program
    check(inputs(kind, (3, width), BF16, device, residual=True, bias=True), kind)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_any_strides(kind: str, device: torch.device) -> None:
    given = inputs(kind, (5, 7, 82), BF16, device, residual=True, bias=True)
    even = {name: value[..., ::2].contiguous() for name, value in given.items()}
    odd = {name: value[..., ::2] for name, value in given.items()}
    # Rows with gaps between them, and rows that no single stride reaches.
    gapped = dict(even, x=torch.cat([even["x"], even["x"]], dim=-1)[..., :41])
    turned = dict(even, x=even["x"].transpose(0, 1).contiguous().transpose(0, 1))
    expected = run(ours, even, kind)
    for layout in (odd, gapped, turned):
        assert not layout["x"].is_contiguous()
        for name, value in run(ours, layout, kind).items():
            assert torch.equal(value, expected[name]), name
    x = even["x"].requires_grad_()
    ours(x, even["weight_D"], None, kind=kind, residual=None).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("used", ["y", "s"])
def test_one_of_two_outputs_gets_a_gradient(kind: str, used: str, device: torch.device) -> None:
    given = inputs(kind, (7, 41), FP32, device, residual=True, bias=True)
    grads = []
    for norm in (ours, torch_norm):
        leaves = {name: given[name].clone().requires_grad_() for name in ("x", "residual", "weight_D")}
        y, s = norm(leaves["x"], leaves["weight_D"], given.get("bias_D"), kind=kind, residual=leaves["residual"])
        grads.append(
            torch.autograd.grad(y if used == "y" else s, list(leaves.values()), given["dy"], allow_unused=True)
        )
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_sums_repeat_bit_for_bit(kind: str, device: torch.device) -> None:
    given = inputs(kind, (113, 41), BF16, device, residual=True, bias=True)
    first, second = run(ours, given, kind), run(ours, given, kind)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_nan_stays_in_its_row(kind: str, device: torch.device) -> None:
    given = inputs(kind, (7, 41), FP32, device, residual=True, bias=True)
    clean = run(ours, given, kind)
    given["x"][3, 5] = float("nan")
    found = run(ours, given, kind)
    for name in ("y", "dx"):
        assert bool(found[name][3].isnan().all())
        kept = [row for row in range(7) if row != 3]
        assert torch.equal(found[name][kept], clean[name][kept])
    assert bool(found["dweight_D"].isnan().all())


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_no_rows(kind: str, device: torch.device) -> None:
    found = run(ours, inputs(kind, (2, 0, 41), BF16, device, residual=True, bias=True), kind)
    assert found["y"].shape == found["s"].shape == found["dx"].shape == (2, 0, 41)
    for name in {"dweight_D", "dbias_D"} & set(found):
        assert torch.equal(found[name], torch.zeros(41, dtype=BF16, device=device))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_compiles_into_one_graph(kind: str, device: torch.device) -> None:
    given = inputs(kind, (7, 41), FP32, device, residual=True, bias=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = run(ours, given, kind)
    for name, value in run(compiled, given, kind).items():
        assert torch.equal(value, expected[name]), name
    given.pop("residual"), given.pop("ds")
    assert torch.equal(run(compiled, given, kind)["dx"], run(ours, given, kind)["dx"])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_operators_say_what_they_return(kind: str, device: torch.device) -> None:
    given = inputs(kind, (3, 2, 41), BF16, device, residual=True, bias=True)
    x, weight_D, bias_D = given["x"], given["weight_D"], given.get("bias_D")
    stats = [torch.ones(6, device=device) for _ in range(2)]
    if kind == "rms":
        calls = [
            (rms_norm_module._rms_norm, (x, weight_D, EPS)),
            (rms_norm_module._add_rms_norm, (x, x, weight_D, EPS)),
            (rms_norm_module._rms_norm_backward, (x, None, x, weight_D, stats[0])),
        ]
    else:
        calls = [
            (layer_norm_module._layer_norm, (x, weight_D, bias_D, EPS)),
            (layer_norm_module._add_layer_norm, (x, x, weight_D, None, EPS)),
            (layer_norm_module._layer_norm_backward, (x, x, x, weight_D, *stats, 2)),
        ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64])
def test_reference_is_torchs(kind: str, dtype: torch.dtype) -> None:
    given = inputs(kind, (7, 41), dtype, torch.device("cpu"), residual=True, bias=True)
    exact, baseline = run(torch_norm, given, kind, torch.float64), run(torch_norm, given, kind)
    for name, value in run(plain, given, kind).items():
        if dtype == torch.float64:
            torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12)
        else:
            assert_twice_as_good(f"{kind} {name}", value, baseline[name], exact[name])


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_reference_gradients(kind: str) -> None:
    given = inputs(kind, (3, 7), torch.float64, torch.device("cpu"), residual=True, bias=True)
    x, residual, weight_D = (given[name].requires_grad_() for name in ("x", "residual", "weight_D"))
    bias_D = given["bias_D"].requires_grad_() if kind == "layer" else None
    assert torch.autograd.gradcheck(
        lambda x, r, w, b: plain(x, w, b, kind=kind, residual=r), (x, residual, weight_D, bias_D)
    )


def refused(change: dict[str, Any], device: torch.device, norm: Callable[..., Any], kind: str) -> str:
    given: dict[str, Any] = inputs(kind, (3, 41), FP32, device, residual=True, bias=True)
    given |= change
    with pytest.raises(ValueError) as error:
        norm(given["x"], given["weight_D"], given.get("bias_D"), kind=kind, residual=given["residual"])
    return str(error.value)


@pytest.mark.parametrize("norm", [ours, plain])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_refusals(norm: Callable[..., Any], kind: str, device: torch.device) -> None:
    def ones(*shape: int, **options: Any) -> Tensor:
        return torch.ones(shape, device=device).to(**options) if options else torch.ones(shape, device=device)

    for change, message in [
        ({"x": ones(3, 41, dtype=torch.int64)}, "x is torch.int64: must be floating"),
        ({"x": torch.tensor(1.0, device=device)}, "x has shape (): must be (..., D) with D >= 1"),
        ({"x": ones(3, 0)}, "x has shape (3, 0): must be (..., D) with D >= 1"),
        ({"weight_D": ones(40)}, "weight_D has shape (40,): must be (D,), here (41,)"),
        ({"weight_D": ones(41, dtype=BF16)}, "weight_D is torch.bfloat16: must be of the dtype of x, torch.float32"),
        ({"weight_D": ones(41, device="meta")}, f"weight_D is on meta: must be on the device of x, {ones(1).device}"),
        ({"residual": ones(3, 1)}, "residual has shape (3, 1): must be that of x, (3, 41)"),
        ({"residual": ones(3, 41, dtype=FP16)}, "residual is torch.float16: must be of the dtype of x, torch.float32"),
    ]:
        assert refused(change, device, norm, kind) == message
    if kind == "layer":
        change = {"bias_D": ones(1, 41)}
        assert refused(change, device, norm, kind) == "bias_D has shape (1, 41): must be (D,), here (41,)"


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_triton_refuses_more(kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = dict.fromkeys(("x", "residual"), torch.ones(1, 16385, device=device))
    wide |= dict.fromkeys(("weight_D", "bias_D"), torch.ones(16385, device=device))
    message = "x has 16385 channels: Triton's normalisations take up to 16384"
    assert refused(wide, device, ours, kind) == message
    double = {
        name: value.double() for name, value in inputs(kind, (3, 41), FP32, device, residual=True, bias=True).items()
    }
    assert refused(double, device, ours, kind) == "x is torch.float64: Triton kernels take fp32, bf16 and fp16"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = "x is on cpu: Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set"
    assert refused({}, torch.device("cpu"), ours, kind) == message
