"""The norm of gradients, clipping by it and scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_kernels.reference import grad_norm as reference
from engine_kernels.triton import grad_norm as fused

both = pytest.mark.parametrize("kernels", [reference, fused], ids=["reference", "triton"])
Kernels = Any
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Buffers that nobody has written hold NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        buffer = empty(*args, **options)
        return buffer.fill_(math.nan) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch, "empty", poisoned)


def wild(device: torch.device) -> list[Tensor]:
    """Tensors of every dtype and of many sizes: empty, one element, more than a chunk, at odd addresses, transposed."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (0,), (), (41, 113), (fused._CHUNK,), (2 * fused._CHUNK + 4097,), (7,), (4096,), (3, 0, 2), (1000,)]
    found = [torch.randn(shape, generator=generator).to(device, DTYPES[i % 3]) for i, shape in enumerate(shapes)]
    found += [torch.randn(9001, generator=generator).to(device, dtype)[1:] for dtype in DTYPES]
    found += [torch.randn(50, 123, generator=generator).to(device, dtype).t() for dtype in DTYPES]
    return [*found, torch.randn(41, 10, generator=generator).to(device)[:, ::3]]


def exact(tensors: list[Tensor]) -> float:
    return math.fsum(float(tensor.double().square().sum()) for tensor in tensors)


@both
def test_the_sum_of_squares(kernels: Kernels, device: torch.device) -> None:
    tensors = wild(device)
    found = kernels.squared_norm(tensors)
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert found.device.type == device.type
    assert float(found) == pytest.approx(exact(tensors), rel=2**-23)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_is_not_more_exact(dtype: torch.dtype, device: torch.device) -> None:
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(device, dtype) for n in (40000, 1000, 7)]
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    torchs = float(torch.linalg.vector_norm(torch.stack(norms)).double())
    wanted = math.sqrt(exact(tensors))
    found = math.sqrt(float(fused.squared_norm(tensors)))
    assert abs(found - wanted) <= 2 * abs(torchs - wanted) + 2**-23 * wanted


@both
def test_the_same_sum_again_and_each_tensor_once(kernels: Kernels, device: torch.device) -> None:
    tensors = wild(device)
    assert torch.equal(kernels.squared_norm(tensors), kernels.squared_norm(tensors))
    for tensor in tensors[:10]:
        assert float(kernels.squared_norm([tensor])) == pytest.approx(exact([tensor]), rel=2**-23)


@both
def test_ones_are_counted(kernels: Kernels, device: torch.device) -> None:
    """Sums of ones are exact, so that an element left out or taken twice shows."""
    sizes = [1, 4095, 4096, 4097, fused._CHUNK - 1, fused._CHUNK, fused._CHUNK + 1]
    tensors = [torch.ones(size, dtype=DTYPES[i % 3], device=device) for i, size in enumerate(sizes)]
    assert float(kernels.squared_norm(tensors)) == sum(sizes)
    assert float(kernels.squared_norm([tensor[1:] for tensor in tensors])) == sum(sizes) - len(sizes)


@both
def test_no_tensors_and_no_elements(kernels: Kernels, device: torch.device) -> None:
    assert kernels.squared_norm([]).item() == 0.0
    assert kernels.squared_norm([]).dtype == torch.float64
    found = kernels.squared_norm([torch.zeros(0, device=device), torch.zeros(3, 0, device=device)])
    assert found.item() == 0.0
    assert found.device.type == device.type
    kernels.scale_([], torch.tensor(2.0, device=device))
    kernels.scale_([torch.zeros(0, device=device)], torch.tensor(2.0, device=device))


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4096])
def test_what_is_not_finite_shows(
    kernels: Kernels, dtype: torch.dtype, bad: float, place: int, device: torch.device
) -> None:
    tensor = torch.ones(4097, dtype=dtype, device=device)
    tensor[place] = bad
    found = float(kernels.squared_norm([torch.ones(41, device=device), tensor]))
    assert math.isnan(found) if math.isnan(bad) else found == math.inf


@both
@pytest.mark.parametrize("working", [torch.float32, torch.float64])
def test_scaling_rounds_once(kernels: Kernels, working: torch.dtype, device: torch.device) -> None:
    tensors, factor = wild(device), torch.tensor(0.3, dtype=working, device=device)
    wanted = [(tensor.float() * factor.float()).to(tensor.dtype) for tensor in tensors]
    kernels.scale_(tensors, factor)
    for tensor, product in zip(tensors, wanted, strict=True):
        assert torch.equal(tensor, product), (tensor.shape, tensor.dtype)


@both
def test_scaling_writes_nothing_else(kernels: Kernels, device: torch.device) -> None:
    whole = torch.ones(4099, device=device)
    kernels.scale_([whole[1:-1]], torch.tensor([2.0], device=device))
    assert whole[0] == whole[-1] == 1.0
    assert (whole[1:-1] == 2.0).all()
    columns = torch.ones(7, 6, device=device)
    kernels.scale_([columns[:, ::2]], torch.tensor(2.0, device=device))
    assert columns.sum(0).tolist() == [14.0, 7.0] * 3


@both
def test_a_factor_of_one_changes_nothing(kernels: Kernels, device: torch.device) -> None:
    tensors, before = wild(device), wild(device)
    kernels.scale_(tensors, torch.tensor(1.0, device=device))
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


@both
def test_a_factor_of_nan_shows(kernels: Kernels, device: torch.device) -> None:
    tensors = [torch.ones(4097, device=device), torch.ones(41, dtype=torch.bfloat16, device=device)]
    kernels.scale_(tensors, torch.tensor(math.nan, device=device))
    assert all(bool(tensor.isnan().all()) for tensor in tensors)


@both
def test_parameters_are_scaled(kernels: Kernels, device: torch.device) -> None:
    parameter = torch.nn.Parameter(torch.ones(41, device=device))
    version = parameter._version
    kernels.scale_([parameter], torch.tensor(0.5, device=device))
    assert (parameter == 0.5).all()
    assert parameter._version > version, "a backward pass could not tell that the values are others"


@both
@pytest.mark.parametrize("working", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.999, 1.0, 1.7, 123.0, 1e30])
@pytest.mark.parametrize("max_norm", [1.0, 0.1, math.inf])
def test_clipping_is_that_of_torch(
    kernels: Kernels, norm: float, max_norm: float, working: torch.dtype, device: torch.device
) -> None:
    given = torch.tensor(norm, dtype=working, device=device)
    found = kernels.clip_factor(given, max_norm)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.device == given.device
    wanted = torch.clamp(max_norm / (given.double() + 1e-6), max=1.0)
    assert float(found) == pytest.approx(float(wanted), rel=2**-22)


@both
@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_a_norm_that_is_not_finite_drops_the_step(
    kernels: Kernels, norm: float, max_norm: float, device: torch.device
) -> None:
    assert kernels.clip_factor(torch.tensor([norm], device=device), max_norm).isnan()


def test_a_compiled_graph_holds_all_three(device: torch.device) -> None:
    def clip(tensors: list[Tensor]) -> Tensor:
        norm = fused.squared_norm(tensors).sqrt()
        fused.scale_(tensors, fused.clip_factor(norm, 1.0))
        return norm

    compiled = torch.compile(clip, backend="aot_eager", fullgraph=True)
    tensors, plain = ([torch.ones(4097, device=device), torch.ones(41, device=device).bfloat16()] for _ in range(2))
    assert torch.equal(compiled(tensors), clip(plain))
    for one, other in zip(tensors, plain, strict=True):
        assert torch.equal(one, other)
        assert (one < 1.0).all()


def one(dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return torch.ones((), dtype=dtype, **options)


REFUSED: list[tuple[Callable[[Kernels], Any], str]] = [
    (lambda k: k.squared_norm([one(), one(torch.int64)]), r"tensors\[1\] in torch.int64 must be in a floating dtype"),
    (lambda k: k.scale_([one(torch.bool)], one()), r"tensors\[0\] in torch.bool must be in a floating dtype"),
    (lambda k: k.squared_norm([one(), one(device="meta")]), r"tensors\[1\] on meta must lie beside tensors\[0\], on c"),
    (lambda k: k.scale_([one()], one(device="meta")), r"factor on meta must lie beside the tensors, on c"),
    (lambda k: k.scale_([one()], torch.ones(2)), r"factor of shape \(2,\) must be one number"),
    (lambda k: k.clip_factor(torch.ones(2), 1.0), r"norm of shape \(2,\) in torch.float32 must be one floating number"),
    (lambda k: k.clip_factor(one(torch.int64), 1.0), r"norm of shape \(\) in torch.int64 must be one floating number"),
    (lambda k: k.clip_factor(one(), 0.0), r"max_norm=0.0 must be positive"),
    (lambda k: k.clip_factor(one(), math.nan), r"max_norm=nan must be positive"),
]
REFUSED_BY_TRITON: list[tuple[Callable[[Kernels], Any], str]] = [
    (
        lambda k: k.squared_norm([one(torch.float64)]),
        r"tensors\[0\] in torch.float64 must be in torch.float32",
    ),
    (lambda k: k.scale_([one()], one(torch.bfloat16)), r"factor in torch.bfloat16 must be in torch.float32 or torch.f"),
]


@both
@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(kernels: Kernels, call: Callable[[Kernels], Any], message: str, device: torch.device) -> None:
    with device, pytest.raises(ValueError, match=message):
        call(kernels)


@pytest.mark.parametrize(("call", "message"), REFUSED_BY_TRITON)
def test_refusals_of_dtypes(call: Callable[[Kernels], Any], message: str, device: torch.device) -> None:
    with device, pytest.raises(ValueError, match=message):
        call(fused)


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for call in (
        lambda: fused.squared_norm([torch.ones(3)]),
        lambda: fused.scale_([torch.ones(3)], torch.tensor(2.0)),
        lambda: fused.clip_factor(torch.tensor(2.0), 1.0),
    ):
        with pytest.raises(
            ValueError, match=r"is on cpu: Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set"
        ):
            call()
