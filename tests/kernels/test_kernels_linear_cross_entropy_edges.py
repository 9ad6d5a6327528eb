"""Linear and cross-entropy in chunks: backward passes, compiled graphs, extreme numbers and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.dist.context import SINGLE
from engine.parallel.cross_entropy import vocab_parallel_cross_entropy
from engine_kernels.reference.linear_cross_entropy import linear_cross_entropy as reference
from engine_kernels.triton import linear_cross_entropy as module
from engine_kernels.triton import linear_cross_entropy_rows as rows
from engine_kernels.triton.linear_cross_entropy import linear_cross_entropy
from tests.helpers.fused_loss import ALL, FLOATS, draw, exact, measure


def loss_of(values: list[Tensor], labels: Tensor, divisor: float = 17.0, **options: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [v.requires_grad_() for v in values]
    number = torch.tensor(divisor, device=labels.device)
    return linear_cross_entropy(*leaves[:2], labels, bias_V=(*leaves, None)[2], divisor=number, **options), leaves


def test_a_second_backward_pass_is_refused(device: torch.device) -> None:
    loss, leaves = loss_of(*draw(device, (7, 7, 41), 41, torch.float32), vocab_size=41)
    torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second one over the same graph needs another forward pass"):
        torch.autograd.grad(loss, leaves)


def test_second_derivatives_are_refused(device: torch.device) -> None:
    loss, leaves = loss_of(*draw(device, (7, 7, 41), 41, torch.float32), vocab_size=41)
    with pytest.raises(RuntimeError, match="no second derivatives: create_graph=True"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_tensor_is_scaled_where_the_factor_is_not_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(rows, "SCALE_BLOCK", 16)
    monkeypatch.setattr(rows, "SCALE_PROGRAMS", 3)
    start = torch.randn(113, device=device).to(dtype)
    for factor in (1.0, -0.3, 0.0, float("nan")):
        x, number = start.clone(), torch.tensor(factor, device=device)
        rows.scale_in_place(x, number)
        want = (start.float() * number).to(dtype)
        torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_compiles_without_a_break(device: torch.device, dtype: torch.dtype, dynamic: bool) -> None:
    values, labels = draw(device, (7, 7, 113), 41, dtype, bias=True)
    options = {**ALL, "vocab_size": 41}
    want = measure(linear_cross_entropy, values, labels, 3.0, **options)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for found, right in zip(measure(compiled, values, labels, 3.0, **options), want, strict=True):
        assert torch.equal(found, right)
    with torch.no_grad():
        loss = compiled(*values[:2], labels, bias_V=values[2], divisor=torch.tensor(17.0, device=device), **options)
    assert torch.equal(loss, want[0])


def test_operators_keep_their_contracts(device: torch.device) -> None:
    values, labels = draw(device, (7, 7, 41), 41, torch.bfloat16, bias=True)
    x, weight, bias = (v.requires_grad_() for v in values)
    numbers = (41, 0.5, 0.1, 0.01, -100, "")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for wants in ((True, True, True), (True, False, False)):
        arguments = (x, weight, bias, labels, torch.tensor(17.0, device=device), *numbers, *wants)
        torch.library.opcheck(module._linear_cross_entropy, arguments, test_utils=tests)
    torch.library.opcheck(module._scale_unless_one, (x.detach(), torch.tensor(2.0, device=device)), test_utils=tests)


def test_shares_of_a_large_batch_in_fp16(device: torch.device) -> None:
    """A loss scale keeps gradients alive that are below the smallest number of fp16 before it."""
    values, labels = draw(device, (41, 7, 113), 113, torch.float16, bias=True)
    divisor, upstream = torch.tensor(2.0**24, device=device), 2.0**20
    found = measure(linear_cross_entropy, values, labels, upstream, divisor=divisor, vocab_size=113)
    want = exact(values, labels, upstream, divisor=divisor, vocab_size=113)
    for got, right in zip(found[1:], want[1:], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=0, atol=0.01 * float(right.abs().max()))


def test_gradients_of_many_tokens_in_fp16(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over tokens is above the largest number of fp16, its share is not."""
    x = torch.full((41, 1), 6e4, device=device, dtype=torch.float16)
    weight = torch.zeros((2, 1), device=device, dtype=torch.float16)
    labels = torch.zeros(41, device=device, dtype=torch.int64)
    monkeypatch.setattr(module, "FP16_TOKENS", 1)
    found = measure(linear_cross_entropy, [x, weight], labels, divisor=torch.tensor(41.0, device=device), vocab_size=2)
    torch.testing.assert_close(found[2].float().flatten().cpu(), torch.tensor([-3e4, 3e4]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("function", [linear_cross_entropy, reference])
def test_extreme_numbers(device: torch.device, function: Any) -> None:
    values, labels = draw(device, (7, 7, 41), 41, torch.float32, bias=True)
    large = [1e4 * values[0], *values[1:]]
    for got, right in zip(
        measure(function, large, labels, vocab_size=41), exact(large, labels, vocab_size=41), strict=True
    ):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)
    masked = [*values[:2], values[2].masked_fill(torch.arange(41, device=device) % 3 == 0, float("-inf"))]
    possible = torch.where(labels % 3 == 0, labels + 1, labels)
    assert (labels % 3 == 0).any()
    assert (possible < 41).all()
    for got, right in zip(
        measure(function, masked, possible, vocab_size=41), exact(masked, possible, vocab_size=41), strict=True
    ):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [linear_cross_entropy, reference])
def test_nan_in_nan_out_and_unknown_labels(device: torch.device, function: Any) -> None:
    values, labels = draw(device, (7, 7, 113), 41, torch.float32)
    broken = values[0].clone()
    broken[2, 3] = float("nan")
    loss, grad_x, grad_weight = measure(function, [broken, values[1]], labels, vocab_size=41)
    assert loss.isnan()
    assert grad_x[2].isnan().all()
    assert not grad_x[[0, 1, 3]].isnan().any()
    assert grad_weight[:41].isnan().all()
    for label in (41, 112, 113, 2**40, -1):
        unknown = labels.clone()
        unknown[2] = label
        loss, grad_x, _ = measure(function, values, unknown, vocab_size=41)
        assert loss.isnan()
        assert grad_x[2].isnan().all()
        assert not grad_x[[0, 1, 3]].isnan().any()


def test_the_loss_of_models_that_do_not_fuse_it(device: torch.device) -> None:
    (x, weight), labels = draw(device, (41, 7, 113), 41, torch.float32)
    logits = (x @ weight.t())[None]
    want = vocab_parallel_cross_entropy(logits, labels[None], vocab_size=41, tp=SINGLE, smoothing=0.1, z_loss=0.01)
    for function in (linear_cross_entropy, reference):
        found = function(
            x, weight, labels, divisor=torch.tensor(17.0, device=device), vocab_size=41, smoothing=0.1, z_loss=0.01
        )
        torch.testing.assert_close(found, want.sum() / 17, rtol=1e-5, atol=0)


def test_reference_gradients_are_those_of_its_values() -> None:
    (x, weight, bias), labels = draw(torch.device("cpu"), (7, 7, 41), 13, torch.float64, bias=True)
    inputs = tuple(v.requires_grad_() for v in (x, weight, bias))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference(x, weight, labels, bias_V=bias, divisor=torch.tensor(3.0), vocab_size=13, **ALL)

    assert torch.autograd.gradcheck(loss, inputs)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    (r"x_TD of shape \(2, 3, 4\) does not have the two dims", {"x_TD": torch.zeros(2, 3, 4)}),
    (r"x_TD of torch.int64 is not of a floating dtype", {"x_TD": torch.zeros(7, 4, dtype=torch.int64)}),
    (r"weight_VD of shape \(9, 5\) is not \(vocabulary, 4\)", {"weight_VD": torch.zeros(9, 5)}),
    (r"weight_VD of torch.bfloat16 is not of the dtype of x_TD", {"weight_VD": torch.zeros(9, 4).bfloat16()}),
    (r"labels_T of shape \(6,\) is not \(7,\)", {"labels_T": torch.zeros(6, dtype=torch.int64)}),
    (r"labels_T of torch.int32 is not of torch.int64", {"labels_T": torch.zeros(7, dtype=torch.int32)}),
    (r"divisor of shape \(2,\) is not one number", {"divisor": torch.ones(2)}),
    (r"divisor with requires_grad=True", {"divisor": torch.ones((), requires_grad=True)}),
    (r"bias_V of shape \(8,\) is not \(9,\)", {"bias_V": torch.zeros(8)}),
    (r"bias_V of torch.int64 is not of a floating dtype", {"bias_V": torch.zeros(9, dtype=torch.int64)}),
    (r"labels_T on meta is not on the device of x_TD", {"labels_T": torch.zeros(7, dtype=torch.int64, device="meta")}),
    (r"vocab_size 10 is not in 1\.\.9", {"vocab_size": 10}),
    (r"vocab_size 0 is not in 1\.\.9", {"vocab_size": 0}),
    (r"smoothing 1.0 is not in \[0, 1\)", {"smoothing": 1.0}),
]
FUSED_REFUSED: list[tuple[str, dict[str, Any]]] = [
    (r"x_TD of torch.float64 is not of", {"x_TD": torch.zeros(7, 4).double(), "weight_VD": torch.zeros(9, 4).double()}),
    (r"bias_V of torch.float64 is not of", {"bias_V": torch.zeros(9).double()}),
]


@pytest.mark.parametrize(
    ("function", "message", "changes"),
    [(f, *case) for f in (linear_cross_entropy, reference) for case in REFUSED]
    + [(linear_cross_entropy, *case) for case in FUSED_REFUSED],
)
def test_refusals(device: torch.device, function: Any, message: str, changes: dict[str, Any]) -> None:
    inputs = {
        "x_TD": torch.zeros(7, 4),
        "weight_VD": torch.zeros(9, 4),
        "labels_T": torch.zeros(7, dtype=torch.int64),
        "divisor": torch.ones(()),
        "vocab_size": 9,
        **changes,
    }
    tensors = {k: v.to(device) for k, v in inputs.items() if isinstance(v, Tensor) and v.device.type != "meta"}
    tensors = {k: v.detach().requires_grad_(inputs[k].requires_grad) for k, v in tensors.items()}
    with pytest.raises(ValueError, match=message):
        function(**{**inputs, **tensors})


def test_no_launch_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    values, labels = draw(torch.device("cpu"), (7, 7, 41), 41, torch.float32)
    with pytest.raises(
        ValueError, match="x_TD is on cpu: Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set"
    ):
        loss_of(values, labels, vocab_size=41)
