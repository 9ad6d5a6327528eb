"""SwiGLU and GELU: the references against torch, the Triton kernels against fp64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine_kernels.reference import activation as reference
from engine_kernels.triton import activation
from tests.helpers.twice import assert_twice_as_good

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = ("swiglu", "none", "tanh")
"""SwiGLU and both forms of GELU."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def torchs(op: str, h: Tensor, bias_F: Tensor | None) -> Tensor:
    """As the engine's feed-forward does it, the bias outside."""
    if op == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(h if bias_F is None else h + bias_F, approximate=op)


def of(module: ModuleType) -> Callable[..., Any]:
    def call(op: str, h: Tensor, bias_F: Tensor | None) -> Any:
        return module.swiglu(h) if op == "swiglu" else module.gelu(h, bias_F, approximate=op)

    return call


ours, plain = of(activation), of(reference)


def run(
    call: Callable[..., Any], op: str, h: Tensor, bias_F: Tensor | None, dout: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Value and gradients, of the inputs cast to `dtype`."""
    leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in (h, bias_F) if t is not None]
    out = call(op, leaves[0], leaves[1] if len(leaves) > 1 else None)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def inputs(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, bias: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(h, bias, gradient of the value) for values of `shape`."""
    torch.manual_seed(shape[-1])
    wide = (*shape[:-1], shape[-1] * (2 if op == "swiglu" else 1))
    h, bias_F, dout = torch.randn(wide) * 2, torch.randn(shape[-1]), torch.randn(shape)
    h, bias_F, dout = (t.to(dtype).to(device) for t in (h, bias_F, dout))
    return h, bias_F if bias else None, dout


# The sums over rows have several tiles for a program from 25 rows of 1000 on in the interpreter.
CASES = [
    ("swiglu", (2, 7, 41), FP32, False),
    ("swiglu", (41, 1000), BF16, False),
    ("swiglu", (7, 1, 123), FP16, False),
    ("swiglu", (3, 2050), BF16, False),
    ("none", (2, 7, 41), FP32, True),
    ("none", (113, 1000), BF16, True),
    ("none", (41, 123), FP16, False),
    ("none", (1, 1), FP32, True),
    ("tanh", (2, 7, 41), FP32, False),
    ("tanh", (41, 2050), BF16, True),
    ("tanh", (1000, 7), FP16, True),
    ("tanh", (7, 1000), BF16, False),
]


@pytest.mark.parametrize(("op", "shape", "dtype", "bias"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_error_is_at_most_twice_torchs(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, bias: bool, device: torch.device
) -> None:
    given = inputs(op, shape, dtype, device, bias=bias)
    exact, baseline = run(torchs, op, *given, dtype=torch.float64), run(torchs, op, *given)
    for name, *values in zip(("out", "dh", "dbias"), run(ours, op, *given), baseline, exact, strict=False):
        assert_twice_as_good(f"{op} {name}", *values)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_normal_distribution_in_16_bits(dtype: torch.dtype, device: torch.device) -> None:
    """Every value of x that matters: what is computed errs by less than half of a rounding, in the tails too."""
    h = torch.linspace(-5, 5, 4001).to(dtype).to(device)
    out, dh = run(ours, "none", h, None, torch.ones_like(h))
    exact, dexact = run(torchs, "none", h, None, torch.ones_like(h), dtype=torch.float64)
    step = torch.finfo(dtype).eps * 0.55
    tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert bool(((out - exact).abs() <= step * exact.abs() + tiny).all())
    assert bool(((dh - dexact).abs() <= step * dexact.abs().clamp(min=1e-2)).all())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # exp(x) is infinite on the way to 0 or 1
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_large_values(op: str, dtype: torch.dtype, device: torch.device) -> None:
    large = torch.tensor([16.0, 30.0, 90.0, 1e4, torch.finfo(dtype).max])
    h = torch.cat([-large, torch.zeros(1), large]).to(dtype).to(device)
    given = torch.cat([h, torch.ones_like(h)]) if op == "swiglu" else h
    out, dgiven = run(ours, op, given, None, torch.ones_like(h))
    near = {"rtol": torch.finfo(dtype).eps, "atol": 1e-4}
    torch.testing.assert_close(out, h.clamp(min=0), **near)
    slope = torch.where(h == 0, 0.5, (h > 0).to(dtype))
    torch.testing.assert_close(dgiven[: len(h)], slope.to(dtype), **near)


@pytest.mark.parametrize("op", OPS)
def test_nan_stays_where_it_is(op: str, device: torch.device) -> None:
    h, bias_F, dout = inputs(op, (5, 8), FP32, device, bias=op != "swiglu")
    h[2, 3] = float("nan")
    out, dh, *dbias = run(ours, op, h, bias_F, dout)
    assert out.isnan().nonzero().tolist() == [[2, 3]]
    assert dh.isnan().nonzero().tolist() == ([[2, 3], [2, 11]] if op == "swiglu" else [[2, 3]])
    for value in dbias:
        assert value.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("op", OPS)
def test_any_strides(op: str, device: torch.device) -> None:
    h, bias_F, dout = inputs(op, (5, 6, 7), BF16, device, bias=op != "swiglu")
    expected = run(ours, op, h, bias_F, dout)
    for turn in (
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
        lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t,
    ):
        turned = [None if t is None else turn(t) for t in (h, bias_F, dout)]
        assert turned[0] is not None and not turned[0].is_contiguous()
        for mine, theirs in zip(run(ours, op, *turned), expected, strict=True):
            assert torch.equal(mine, theirs)
    # A gradient with strides of zero.
    summed = run(ours, op, h, bias_F, torch.ones((), dtype=BF16, device=device).expand(5, 6, 7))
    assert all(map(torch.equal, summed, run(ours, op, h, bias_F, torch.ones_like(dout))))


def test_sums_repeat_bit_for_bit(device: torch.device) -> None:
    given = inputs("tanh", (1000, 41), BF16, device, bias=True)
    assert all(map(torch.equal, run(ours, "tanh", *given), run(ours, "tanh", *given)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(2, 0, 7), (5, 0)])
def test_nothing_to_do(op: str, shape: tuple[int, ...], device: torch.device) -> None:
    given = inputs(op, shape, BF16, device, bias=op != "swiglu")
    out, dh, *dbias = run(ours, op, *given)
    assert out.shape == shape and dh.shape == given[0].shape
    for value in dbias:
        assert torch.equal(value, torch.zeros(shape[-1], dtype=BF16, device=device))


def test_one_dimension(device: torch.device) -> None:
    h = torch.linspace(-2, 2, 14, device=device)
    torch.testing.assert_close(activation.swiglu(h), torchs("swiglu", h, None))
    torch.testing.assert_close(activation.gelu(h, h, approximate="none"), torchs("none", h, h))


@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph(op: str, device: torch.device) -> None:
    given = inputs(op, (5, 7), FP32, device, bias=op != "swiglu")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(compiled, op, *given), run(ours, op, *given)))
    h, _, dout = given
    assert all(map(torch.equal, run(compiled, op, h, None, dout), run(ours, op, h, None, dout)))


def test_operators_say_what_they_return(device: torch.device) -> None:
    h, dout = torch.ones(2, 3, 8, device=device, dtype=BF16), torch.ones(2, 3, 4, device=device, dtype=BF16)
    bias_F = torch.ones(8, device=device, dtype=BF16)
    for operator, arguments in (
        (activation._swiglu, (h,)),
        (activation._swiglu_backward, (dout, h)),
        (activation._gelu, (h, bias_F, True)),
        (activation._gelu_backward, (h, h, False)),
        (activation._gelu_bias_backward, (h, h, bias_F, True)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64])
def test_reference_is_torchs(op: str, dtype: torch.dtype) -> None:
    given = inputs(op, (5, 41), dtype, torch.device("cpu"), bias=op != "swiglu")
    exact, baseline = run(torchs, op, *given, dtype=torch.float64), run(torchs, op, *given)
    for mine, theirs, true in zip(run(plain, op, *given), baseline, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
        else:
            assert_twice_as_good(op, mine, theirs, true)


@pytest.mark.parametrize("op", OPS)
def test_reference_gradients(op: str) -> None:
    h, bias_F, _ = inputs(op, (3, 4), torch.float64, torch.device("cpu"), bias=op != "swiglu")
    leaves = [t.requires_grad_() for t in (h, bias_F) if t is not None]
    assert torch.autograd.gradcheck(lambda h, b=None: plain(op, h, b), leaves)


@pytest.mark.parametrize("module", [activation, reference])
def test_refusals(module: ModuleType, device: torch.device) -> None:
    def ones(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    here = ones(1).device
    for h, message in [
        (ones(3, 7), "h has shape (3, 7): must be (..., 2F), the last dimension even"),
        (ones(), "h has shape (): must be (..., 2F), the last dimension even"),
        (ones(3, 8, dtype=torch.int64), "h is torch.int64: must be floating"),
    ]:
        with pytest.raises(ValueError) as error:
            module.swiglu(h)
        assert str(error.value) == message
    for h, bias_F, form, message in [
        (ones(3, 7), None, "erf", "approximate is 'erf': must be 'none' or 'tanh'"),
        (ones(3, 7, dtype=torch.bool), None, "none", "h is torch.bool: must be floating"),
        (ones(), None, "none", "h has shape (): must be (..., F)"),
        (ones(3, 7), ones(1), "none", "bias_F has shape (1,): must be (F,), here (7,)"),
        (ones(3, 7), ones(7, dtype=BF16), "tanh", f"bias_F is {BF16}: must be of the dtype of h, {FP32}"),
        (ones(3, 7), ones(7).to("meta"), "tanh", f"bias_F is on meta: must be on the device of h, {here}"),
    ]:
        with pytest.raises(ValueError) as error:
            module.gelu(h, bias_F, approximate=form)
        assert str(error.value) == message


@pytest.mark.parametrize("op", OPS)
def test_triton_refuses_more(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError) as error:
        ours(op, torch.ones(3, 8, device=device, dtype=torch.float64), None)
    assert str(error.value) == "h is torch.float64: Triton kernels take fp32, bf16 and fp16"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError) as error:
        ours(op, torch.ones(3, 8), None)
    assert str(error.value) == "h is on cpu: Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set"
