"""fp8 linears: the products against fp64, rounding against its bound, what is not a number, what is compiled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.config.derived import FP8_MULTIPLE
from engine_kernels import scaled_mm
from engine_kernels.kernels import PLAIN_LINEAR, Linear
from engine_kernels.reference.fp8_linear import E4M3, E5M2, MULTIPLE, cast, emulated, emulated_product, scale_of
from engine_kernels.registry import Situation, choose
from engine_kernels.scaled_mm import scaled_product
from tests.helpers.fp8 import draw, error_bound, exact, measure, rms_bound

LINEARS = [pytest.param(emulated, id="emulated"), pytest.param(scaled_mm.linear, id="scaled_mm")]


def situation(device: str, dtype: torch.dtype = torch.bfloat16) -> Situation:
    return Situation(torch.device(device), dtype)


@pytest.mark.parametrize(("a_dtype", "rows"), [(E4M3, 48), (E5M2, 7)])
@pytest.mark.parametrize("biased", [True, False])
def test_scaled_mm_is_within_twice_the_error_of_the_emulation(a_dtype: torch.dtype, rows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(rows, 96, generator=generator), torch.randn(32, 96, generator=generator)
    bias = torch.randn(32, generator=generator).bfloat16() if biased else None
    scales = scale_of(a, a_dtype), scale_of(b, E4M3)
    operands = cast(a, scales[0], a_dtype), cast(b, scales[1], E4M3)
    wanted = (operands[0].double() * scales[0]) @ (operands[1].double() * scales[1]).t()
    wanted = wanted if bias is None else wanted + bias.double()
    theirs, ours = (
        product(*operands, *scales, dtype=torch.bfloat16, bias_N=bias) for product in (scaled_product, emulated_product)
    )
    assert theirs.dtype == ours.dtype == torch.bfloat16
    # Half a unit in the last place is what the exact sum misses by.
    assert ((ours - wanted).abs() <= wanted.abs() * 2**-8 * (1 + 1e-4)).all()
    assert (theirs - wanted).abs().max() <= 2 * (ours - wanted).abs().max()


@pytest.mark.parametrize("how", LINEARS)
@pytest.mark.parametrize("shape", [(2, 24, 32, 48), (1, 7, 16, 16), (3, 33, 64, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_within_the_rounding_of_fp8(
    how: Linear, shape: tuple[int, int, int, int], bias: bool
) -> None:
    tensors = draw(*shape, bias=bias)
    found, wanted = measure(how.linear, *tensors), exact(*tensors)
    for name, bound in error_bound(*tensors).items():
        assert found[name].dtype is torch.bfloat16, name
        assert ((found[name] - wanted[name]).abs() <= bound).all(), name
        if name != "bias":
            error = (found[name] - wanted[name]).norm() / wanted[name].norm()
            assert 0 < error <= rms_bound(name), name


def test_each_tensor_fills_the_range_of_its_format() -> None:
    x = torch.tensor([-3.0, 0.5, 1e-4])
    for dtype, largest in ((E4M3, 448.0), (E5M2, 57344.0)):
        scale = scale_of(x, dtype)
        assert cast(x, scale, dtype).float().tolist()[0] == -largest
        assert float(scale) == pytest.approx(3 / largest, rel=1e-6)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-12, 1e30, 3e38])
def test_scales_are_finite_at_every_size(size: float) -> None:
    x = torch.full((16, 16), size).bfloat16()
    scale = scale_of(x, E5M2)
    assert 0 < float(scale) < math.inf
    back = cast(x, scale, E5M2).double() * scale.double()
    assert float((back - x).abs().max()) <= max(2**-3 * size, 2e-35)


def test_zeros_have_scale_one_and_stay_zeros() -> None:
    zeros = torch.zeros(16, 32, dtype=torch.bfloat16)
    assert float(scale_of(zeros, E4M3)) == 1.0
    found = measure(emulated.linear, zeros, torch.ones(16, 32).bfloat16(), None, torch.zeros(16, 16).bfloat16())
    assert all((value == 0).all() for value in found.values())


@pytest.mark.parametrize("how", LINEARS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 3])
def test_what_is_not_a_number_is_not_hidden(how: Linear, bad: float, where: int) -> None:
    tensors = draw(1, 16, 16, 16, bias=False)
    tensors[where].flatten()[5] = bad
    found = measure(how.linear, *tensors)
    touched = {0: {"y", "weight"}, 1: {"y", "x"}, 3: {"x", "weight"}}[where]
    for name in ("y", "x", "weight"):
        assert found[name].isnan().any() == (name in touched), name


def test_a_gradient_of_any_strides_is_taken() -> None:
    x, weight, _, grad = draw(2, 16, 32, 48, bias=False)
    strided = grad.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    for found, wanted in zip(
        measure(scaled_mm.linear.linear, x, weight, None, strided).values(),
        measure(scaled_mm.linear.linear, x, weight, None, grad).values(),
        strict=True,
    ):
        assert torch.equal(found, wanted)
    y = scaled_mm.linear.linear(x.requires_grad_(), weight)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_no_operand_is_changed() -> None:
    tensors = draw(1, 16, 32, 16, bias=True)
    before = [tensor.clone() for tensor in tensors if tensor is not None]
    measure(emulated.linear, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True) if b is not None)


def test_it_is_traced_whole_and_gives_the_same_numbers() -> None:
    """`aot_eager` traces forward and backward pass as torch.compile does, and generates no code."""
    torch._dynamo.reset()
    tensors = draw(2, 24, 32, 48, bias=True)

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return emulated.linear(torch.nn.functional.gelu(x), weight, bias) * 2

    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for name, value in measure(traced, *tensors).items():
        assert value.abs().sum() > 0, name
        assert torch.equal(value, measure(layer, *tensors)[name]), name


def test_sizes_that_are_no_multiples_are_torchs() -> None:
    assert MULTIPLE == FP8_MULTIPLE == emulated.multiple == scaled_mm.linear.multiple
    assert emulated.of_sizes(48, 32) is emulated
    assert emulated.of_sizes(48, 40) is PLAIN_LINEAR
    assert emulated.of_sizes(56, 32) is PLAIN_LINEAR
    assert PLAIN_LINEAR.of_sizes(3, 5) is PLAIN_LINEAR


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((8, 0), "needs compute capability 8.9 for tensor cores with fp8, and this GPU has 8.0"),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 0), None),
    ],
)
def test_where_tensor_cores_multiply_in_fp8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = choose("fp8_linear", "auto", situation("cuda"))
    assert dict(choice.refused).get("scaled_mm") == reason
    assert choice.impl.name == ("emulated" if reason else "scaled_mm")


def test_cpus_emulate_and_other_dtypes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(choose("fp8_linear", "auto", situation("cpu"))) == (
        "fp8_linear: emulated; not scaled_mm: needs a CUDA device"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert scaled_mm.supports(situation("cuda", torch.float16)) == "gives bf16, not torch.float16"
