"""AdamW over flat state against torch's, in fp64 and in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_kernels.reference import adamw as reference
from engine_kernels.triton import adamw as fused
from tests.helpers.twice import assert_twice_as_good

STEPS = 20
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
NAMES = ("parameter", "exp_avg", "exp_avg_sq")

Step = Callable[..., None]
both = pytest.mark.parametrize("step", [reference.adamw_step, fused.adamw_step], ids=["reference", "triton"])


def draw(n: int, device: torch.device, seed: int) -> Tensor:
    """Normal numbers over three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** -(3 * torch.rand(n, generator=generator))
    return (torch.randn(n, generator=generator) * scale).to(device)


@dataclass
class State:
    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def drawn(cls, n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        values = draw(n, device, 1), draw(n, device, 2), draw(n, device, 3).square()
        return cls(*(x.to(dtype) for x in values))

    def step(self, step: Step, gradient: Tensor, number: int = 3, **options: Any) -> None:
        step(self.parameter, gradient, self.exp_avg, self.exp_avg_sq, **{**OPTIONS, "step": number, **options})

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}


def by_torch(start: Tensor, gradients: list[Tensor], options: dict[str, Any], fused: bool = True) -> State:
    """What torch's AdamW makes of `start` in its dtype."""
    parameter = start.clone()
    optimizer = torch.optim.AdamW([parameter], fused=fused, foreach=False, **options)
    for gradient in gradients:
        parameter.grad = gradient.to(start.dtype)
        optimizer.step()
    state = optimizer.state[parameter]
    return State(parameter, state["exp_avg"], state["exp_avg_sq"])


def same(found: State, wanted: State) -> None:
    for name in NAMES:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@both
@pytest.mark.parametrize(
    ("n", "dtype", "options"),
    [
        (1000, torch.bfloat16, {"weight_decay": 0.0}),
        (1000, torch.float16, {"betas": (0.95, 0.95), "eps": 1e-5}),
        (1000, torch.bfloat16, {"betas": (0.0, 0.3)}),
        (4097, torch.float32, {}),
        (4096, torch.bfloat16, {"lr": 0.1}),
    ],
)
def test_twenty_steps_are_those_of_torch(
    step: Step, n: int, dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> None:
    options = {**OPTIONS, **options}
    gradients = [draw(n, device, 10 + i).to(dtype) for i in range(STEPS)]
    start = draw(n, device, 1)
    found = State(start.clone(), torch.zeros_like(start), torch.zeros_like(start))
    for number, gradient in enumerate(gradients, 1):
        found.step(step, gradient, number, **options)
    single, exact = (by_torch(start.to(working), gradients, options) for working in (torch.float32, torch.float64))
    for name in NAMES:
        assert_twice_as_good(name, getattr(found, name), getattr(single, name), getattr(exact, name))


@both
def test_without_memory_large_moments_are_forgotten(step: Step, device: torch.device) -> None:
    gradient = draw(41, device, 4)
    state = State(torch.zeros(41, device=device), *(torch.full((41,), 1e8, device=device) for _ in range(2)))
    state.step(step, gradient, betas=(0.0, 0.0))
    assert torch.equal(state.exp_avg, gradient)
    torch.testing.assert_close(state.exp_avg_sq, gradient.square(), rtol=1e-6, atol=0)


def test_a_long_memory_does_not_drift(device: torch.device) -> None:
    """0.999 in fp32 is 1.3e-8 too large, which a product would add up to 2.6e-6 in 200 steps."""
    gradient = draw(41, device, 4)
    state = State(torch.zeros_like(gradient), gradient.clone(), gradient.square())
    for _ in range(200):
        state.step(fused.adamw_step, gradient, 1)
    torch.testing.assert_close(state.exp_avg_sq.double(), gradient.double().square(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("n", [1, 7, 41, 1000, 4096])
def test_any_length_is_the_start_of_a_longer_one(n: int, device: torch.device) -> None:
    long = State.drawn(4097, device)
    short = State(*(tensor[:n].clone() for tensor in long.tensors().values()))
    for number in (1, 2):
        gradient = draw(4097, device, 3 + number).bfloat16()
        long.step(fused.adamw_step, gradient, number)
        short.step(fused.adamw_step, gradient[:n].clone(), number)
    same(short, State(*(tensor[:n] for tensor in long.tensors().values())))


@both
def test_gradients_are_scaled_first(step: Step, device: torch.device) -> None:
    n, scale = 1000, 0.3
    gradients = [draw(n, device, 10 + i).bfloat16() for i in range(3)]
    start = draw(n, device, 1)
    found = State(start.clone(), torch.zeros_like(start), torch.zeros_like(start))
    for number, gradient in enumerate(gradients, 1):
        found.step(step, gradient, number, grad_scale=torch.tensor([scale], device=device))
    single, exact = (
        by_torch(start.to(working), [g.to(working) * scale for g in gradients], OPTIONS)
        for working in (torch.float32, torch.float64)
    )
    for name in NAMES:
        assert_twice_as_good(name, getattr(found, name), getattr(single, name), getattr(exact, name))


def test_the_reference_is_exact_in_fp64() -> None:
    cpu = torch.device("cpu")
    gradients = [draw(113, cpu, 10 + i).double() for i in range(STEPS)]
    start = draw(113, cpu, 1).double()
    found = State(start.clone(), torch.zeros_like(start), torch.zeros_like(start))
    for number, gradient in enumerate(gradients, 1):
        found.step(reference.adamw_step, gradient, number)
    wanted = by_torch(start, gradients, OPTIONS)
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-13, atol=1e-16)


@both
@pytest.mark.parametrize(("n", "dtype"), [(41, torch.float16), (4097, torch.bfloat16)])
def test_the_copy_is_the_rounded_parameter(step: Step, n: int, dtype: torch.dtype, device: torch.device) -> None:
    state = State.drawn(n, device)
    state.parameter[:3] = torch.tensor([0.0, -1e6, 1e-7])
    copy = torch.full((n,), math.nan, dtype=dtype, device=device)
    plain = State.drawn(n, device)
    plain.parameter[:3] = torch.tensor([0.0, -1e6, 1e-7])
    gradient = draw(n, device, 4)
    state.step(step, gradient, copy_out=copy)
    plain.step(step, gradient)
    assert torch.equal(copy, state.parameter.to(dtype))
    same(state, plain)


@both
def test_a_factor_of_nan_drops_the_step(step: Step, device: torch.device) -> None:
    n = 4097
    state, before = State.drawn(n, device), State.drawn(n, device)
    gradient = draw(n, device, 4)
    gradient[5] = math.inf
    copy = draw(n, device, 5).bfloat16()
    partial = draw(fused.partial_square_length(n), device, 6)
    kept, summed = copy.clone(), partial.clone()
    scale = torch.tensor(math.nan, device=device)
    state.step(step, gradient, grad_scale=scale, copy_out=copy, partial_square=partial)
    same(state, before)
    assert torch.equal(copy, kept)
    assert torch.equal(partial, summed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_are_their_values(dtype: torch.dtype, device: torch.device) -> None:
    n = 4097
    gradient = draw(n, device, 4).to(dtype)
    half, full = State.drawn(n, device), State.drawn(n, device)
    scale = torch.tensor(0.7, device=device)
    half.step(fused.adamw_step, gradient, grad_scale=scale)
    full.step(fused.adamw_step, gradient.float(), grad_scale=scale)
    same(half, full)


@both
def test_views_at_any_address_and_gradients_of_any_stride(step: Step, device: torch.device) -> None:
    n = 2500
    wide = {name: torch.full((n + 2,), 9.0, device=device) for name in NAMES}
    start = State.drawn(n, device)
    for name, whole in wide.items():
        whole[1:-1] = getattr(start, name)
    views = State(**{name: whole[1:-1] for name, whole in wide.items()})
    gradient = draw(2 * n, device, 4)[::2]
    views.step(step, gradient)
    start.step(step, gradient.contiguous())
    same(views, start)
    for name, whole in wide.items():
        assert whole[0] == whole[-1] == 9.0, f"{name}: a neighbour was written"


@both
@pytest.mark.parametrize(("n", "scale"), [(0, None), (1, 0.1), (2048, None), (4097, 0.1)])
def test_squares_of_the_gradients_by_block(step: Step, n: int, scale: float | None, device: torch.device) -> None:
    gradient = draw(n, device, 4).bfloat16()
    partial = torch.full((fused.partial_square_length(n),), math.nan, device=device)
    state = State.drawn(n, device)
    factor = None if scale is None else torch.tensor(scale, device=device)
    state.step(step, gradient, partial_square=partial, grad_scale=factor)
    wanted = torch.stack([x.double().square().sum() for x in gradient.split(reference.BLOCK)]) if n else partial
    torch.testing.assert_close(partial.double(), wanted.double(), rtol=1e-6, atol=0)


@both
def test_a_small_eps_counts_where_squares_are_denormal(step: Step, device: torch.device) -> None:
    gradient = torch.tensor([1e-18, -3e-18, 2e-19], device=device)
    options = {**OPTIONS, "eps": 1e-25, "weight_decay": 0.0}
    state = State(*(torch.zeros(3, device=device) for _ in NAMES))
    state.step(step, gradient, 1, **options)
    # The first step of Adam goes by the rate, whatever the gradient; squares near 1e-41 have four digits.
    torch.testing.assert_close(state.parameter, -3e-3 * gradient.sign(), rtol=1e-3, atol=0)


@both
def test_what_is_not_finite_is_what_torch_makes_of_it(step: Step, device: torch.device) -> None:
    gradients = [
        torch.tensor([0.1, math.nan, 1e30, math.inf, 0.2], device=device),
        torch.tensor([0.1, 0.3, 0.5, 1.0, 0.2], device=device),
    ]
    start = torch.ones(5, device=device)
    found = State(start.clone(), torch.zeros_like(start), torch.zeros_like(start))
    for number, gradient in enumerate(gradients, 1):
        found.step(step, gradient, number)
    # torch's fused kernel on GPUs subtracts infinity from itself.
    wanted = by_torch(start, gradients, OPTIONS, fused=False)
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), equal_nan=True, msg=name)
    assert found.parameter.isfinite().tolist() == [True, False, True, False, True]


@both
def test_zeros_stay_where_they_are(step: Step, device: torch.device) -> None:
    state = State(*(torch.zeros(41, device=device) for _ in NAMES))
    state.step(step, torch.zeros(41, device=device), 1)
    for name, tensor in state.tensors().items():
        assert not tensor.any(), name


@both
def test_parameters_that_have_gradients_are_stepped(step: Step, device: torch.device) -> None:
    state, plain = State.drawn(41, device), State.drawn(41, device)
    state.parameter = torch.nn.Parameter(state.parameter)
    gradient = draw(41, device, 4)
    version = state.parameter._version
    state.step(step, gradient)
    plain.step(step, gradient)
    same(state, plain)
    assert state.parameter._version > version, "a backward pass could not tell that the values are others"


def test_a_compiled_graph_holds_the_step(device: torch.device) -> None:
    n = 123
    compiled = torch.compile(fused.adamw_step, backend="aot_eager", fullgraph=True)
    state, plain = State.drawn(n, device), State.drawn(n, device)
    copies = [torch.zeros(n, dtype=torch.bfloat16, device=device) for _ in range(2)]
    for number in (1, 2, 3):
        gradient = draw(n, device, 3 + number)
        scale = torch.tensor(0.5, device=device)
        for one, copy, step in ((state, copies[0], compiled), (plain, copies[1], fused.adamw_step)):
            one.step(step, gradient, number, lr=1e-3 / number, grad_scale=scale, copy_out=copy)
    same(state, plain)
    assert torch.equal(*copies)
