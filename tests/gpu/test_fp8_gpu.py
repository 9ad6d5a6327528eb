"""fp8 linears on tensor cores: the products, the layer's rounding, the same compiled, and a short training."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine_kernels import scaled_mm
from engine_kernels.reference.fp8_linear import E4M3, E5M2, cast, emulated, emulated_product, scale_of
from engine_kernels.scaled_mm import scaled_product
from tests.helpers.command import run_command
from tests.helpers.fp8 import draw, error_bound, exact, measure, rms_bound

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU with fp8 tensor cores",
    ),
]


def operands(a_dtype: torch.dtype, m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(k)
    a, b = (torch.randn(rows, k, device="cuda", generator=generator) for rows in (m, n))
    a_scale, b_scale = scale_of(a, a_dtype), scale_of(b, E4M3)
    return cast(a, a_scale, a_dtype), cast(b, b_scale, E4M3), a_scale, b_scale


@pytest.mark.parametrize(("a_dtype", "m", "n", "k"), [(E4M3, 256, 512, 4096), (E5M2, 100, 48, 1024), (E4M3, 7, 16, 16)])
def test_products_are_within_twice_the_error_of_the_emulation(a_dtype: torch.dtype, m: int, n: int, k: int) -> None:
    a, b, a_scale, b_scale = operands(a_dtype, m, n, k)
    wanted = (a.double() * a_scale) @ (b.double() * b_scale).t()
    theirs, ours = (
        (product(a, b, a_scale, b_scale, dtype=torch.bfloat16) - wanted).norm()
        for product in (scaled_product, emulated_product)
    )
    assert theirs <= 2 * ours


def test_fast_sums_lose_less_than_rounding_to_fp8_does() -> None:
    a, b, a_scale, b_scale = operands(E4M3, 512, 512, 8192)
    wanted = (a.double() * a_scale) @ (b.double() * b_scale).t()
    found = scaled_product(a, b, a_scale, b_scale, dtype=torch.bfloat16, fast=True)
    assert (found - wanted).norm() / wanted.norm() <= rms_bound("y") / 4


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 128, 256, 512), (1, 77, 1024, 48)])
def test_outputs_and_gradients_are_within_the_rounding_of_fp8(
    shape: tuple[int, int, int, int], bias: bool, compiled: bool
) -> None:
    torch._dynamo.reset()
    tensors = draw(*shape, bias=bias, device="cuda")
    linear = torch.compile(scaled_mm.linear.linear, fullgraph=True) if compiled else scaled_mm.linear.linear
    found, wanted = measure(linear, *tensors), exact(*tensors)
    for name, bound in error_bound(*tensors).items():
        # Fast sums and fp32's order of them: an eighth of the bound is theirs.
        assert ((found[name] - wanted[name]).abs() <= 1.125 * bound).all(), name
        if name != "bias":
            assert 0 < (found[name] - wanted[name]).norm() / wanted[name].norm() <= rms_bound(name), name


def test_a_compiled_layer_behind_others_has_the_gradients_of_the_uncompiled_one() -> None:
    """torch 2.11 compiles autograd functions that work in place to zero gradients, in silence."""
    torch._dynamo.reset()
    tensors = draw(4, 256, 512, 1024, bias=True, device="cuda")

    def behind_others(linear: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.gelu(linear(F.rms_norm(x, x.shape[-1:]), weight, bias))

    layer = partial(behind_others, scaled_mm.linear.linear)
    found, wanted = measure(torch.compile(layer, fullgraph=True), *tensors), measure(layer, *tensors)
    x, weight, bias, grad = (t if t is None else t.double() for t in tensors)
    exactly = measure(partial(behind_others, F.linear), x, weight, bias, grad)  # type: ignore[arg-type]
    for name, value in found.items():
        error, other = ((v.double() - exactly[name]).norm() / exactly[name].norm() for v in (value, wanted[name]))
        assert error <= 1.25 * other, name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_a_number_is_not_hidden(bad: float, compiled: bool) -> None:
    torch._dynamo.reset()
    linear = torch.compile(scaled_mm.linear.linear, fullgraph=True) if compiled else scaled_mm.linear.linear
    for where, touched in ((0, {"y", "weight"}), (1, {"y", "x"}), (3, {"x", "weight"})):
        tensors = draw(1, 32, 64, 48, bias=False, device="cuda")
        tensors[where].flatten()[5] = bad
        found = measure(linear, *tensors)
        assert {name for name, value in found.items() if value.isnan().any()} == touched


def test_zeros_stay_zeros() -> None:
    tensors = [torch.zeros_like(t) for t in draw(1, 32, 64, 48, bias=False, device="cuda") if t is not None]
    found = measure(scaled_mm.linear.linear, tensors[0], tensors[1], None, tensors[2])
    assert all((value == 0).all() for value in found.values())


def test_tensor_cores_train_as_the_emulation_does() -> None:
    """Ten steps of one layer from equal weights: the same fp8 operands at first, so all that differs are sums."""
    x, weight, _, target = draw(4, 64, 256, 128, bias=False, device="cuda")
    losses = {}
    for name, how in (("scaled_mm", scaled_mm.linear), ("emulated", emulated)):
        w = weight.clone().requires_grad_()
        losses[name] = []
        for _ in range(10):
            loss = (how.linear(x, w) - target).float().square().mean()
            (grad,) = torch.autograd.grad(loss, w)
            w = (w - 0.5 * grad).detach().requires_grad_()
            losses[name].append(float(loss.detach()))
    assert losses["scaled_mm"][-1] < losses["scaled_mm"][0]
    assert losses["scaled_mm"] == pytest.approx(losses["emulated"], rel=5e-3)


def test_training_follows_bf16(tmp_path: Path) -> None:
    curves = {}
    for name in ("bf16", "fp8"):
        words = f"model=llama_tiny precision={name} train.steps=60 data.max_bytes=2000000 optim.lr=1e-3 run.name={name}"
        command = f"{sys.executable} -m engine.train {words} kernels.compile=on logging.every=1 parallel.dp=1"
        done = run_command(command, tmp_path, 400)
        assert done.exit_code == 0, str(done)
        rows = map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        curves[name] = [row["loss"] for row in rows if "loss" in row]
    assert curves["fp8"][-1] < curves["fp8"][0] - 1.0
    assert curves["fp8"] != curves["bf16"]
    assert mean(curves["fp8"][-10:]) == pytest.approx(mean(curves["bf16"][-10:]), rel=1e-2)
