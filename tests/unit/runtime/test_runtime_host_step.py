from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.optim.flat_adamw import FlatAdamW
from engine.runtime.host_step import HostStep, Part, Streamed
from engine_kernels.reference.adamw import adamw_step

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
SIZES, DECAYS = (23, 0, 8), (0.1, 0.0, 0.0)


class Host:
    """Three groups, one of them empty, whose state is stepped in chunks of 5."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, delayed: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.start = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
        groups = [
            {"params": [value.clone()], "weight_decay": decay} for value, decay in zip(self.start, DECAYS, strict=True)
        ]
        self.optimizer = FlatAdamW(groups, update=adamw_step, **OPTIONS)
        self.parts = [
            Part(group, group["params"][0], torch.zeros(len(value)), value.bfloat16())
            for group, value in zip(self.optimizer.param_groups, self.start, strict=True)
        ]
        self.step = HostStep(self.optimizer, self.parts, CPU, Streamed(1.0, delayed=delayed, chunk=5))

    def begin(self, number: int, factor: float = 1.0) -> None:
        for part, gradient in zip(self.parts, gradients(number), strict=True):
            part.gradient.copy_(gradient)
        self.step.begin(torch.tensor(factor))

    def weights(self) -> Tensor:
        return torch.cat([part.weights for part in self.parts])


def gradients(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(size, generator=generator) for size in SIZES]


def torchs(start: list[Tensor], factors: list[float]) -> list[Tensor]:
    """After a step with each factor by torch's AdamW."""
    groups = [{"params": [x.clone()], "weight_decay": decay} for x, decay in zip(start, DECAYS, strict=True)]
    optimizer = torch.optim.AdamW(groups, **OPTIONS)
    for number, factor in enumerate(factors):
        for group, gradient in zip(groups, gradients(number), strict=True):
            group["params"][0].grad = gradient * factor
        optimizer.step()
    return [group["params"][0] for group in groups]


@pytest.mark.parametrize("delayed", [False, True])
def test_chunks_are_stepped_as_torch_steps_the_whole(delayed: bool) -> None:
    host = Host(delayed=delayed)
    for number, factor in enumerate((1.0, 0.25, 1.0)):
        host.begin(number, factor)
        assert host.step.finish() is delayed
    for part, wanted in zip(host.parts, torchs(host.start, [1.0, 0.25, 1.0]), strict=True):
        torch.testing.assert_close(part.state, wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(part.weights, part.state.bfloat16())
    assert not host.step.finish(), "nothing is under way"


def test_late_weights_come_when_the_step_is_finished() -> None:
    host = Host(delayed=True)
    before = host.weights()
    host.begin(0)
    # The next passes write new gradients while the host still steps with the old.
    host.step.release_gradients()
    for part in host.parts:
        part.gradient.fill_(float("nan"))
    assert torch.equal(host.weights(), before)
    host.step.finish()
    assert host.weights().isfinite().all()
    assert not torch.equal(host.weights(), before)


def test_a_factor_that_is_no_number_drops_the_step() -> None:
    host = Host()
    host.begin(0)
    host.step.finish()
    before, states = host.weights(), [part.state.clone() for part in host.parts]
    host.begin(1, float("nan"))
    assert not host.step.finish()
    assert torch.equal(host.weights(), before)
    assert all(torch.equal(part.state, state) for part, state in zip(host.parts, states, strict=True))
    assert [host.optimizer.state[part.state]["step"] for part in host.parts] == [2, 2, 2]
    host.optimizer.uncount()
    assert [host.optimizer.state[part.state]["step"] for part in host.parts] == [1, 1, 1]


def test_bf16_state_is_stepped_in_bf16() -> None:
    host = Host(torch.bfloat16)
    wanted = [[value.clone(), torch.zeros_like(value), torch.zeros_like(value)] for value in host.start]
    for number in range(3):
        host.begin(number)
        host.step.finish()
        for held, gradient, decay in zip(wanted, gradients(number), DECAYS, strict=True):
            for start in range(0, len(gradient), 5):
                weight, mean, square = (x[start : start + 5] for x in held)
                part = gradient[start : start + 5]
                adamw_step(weight, part, mean, square, weight_decay=decay, step=number + 1, **OPTIONS)
    for part, (weight, mean, square) in zip(host.parts, wanted, strict=True):
        moments = host.optimizer.state[part.state]
        assert torch.equal(part.state, weight)
        assert torch.equal(part.weights, weight)
        assert torch.equal(moments["exp_avg"], mean)
        assert torch.equal(moments["exp_avg_sq"], square)
        assert {x.dtype for x in (part.state, moments["exp_avg"], moments["exp_avg_sq"])} == {torch.bfloat16}


def test_rates_are_those_of_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    host, go = Host(delayed=True), threading.Event()
    update = FlatAdamW.update_on_host

    def late(self: FlatAdamW, *given: Any) -> None:
        assert go.wait(20)
        update(self, *given)

    monkeypatch.setattr(FlatAdamW, "update_on_host", late)
    host.begin(0)
    for group in host.optimizer.param_groups:
        group["lr"] = 100.0
    go.set()
    host.step.finish()
    for part, wanted in zip(host.parts, torchs(host.start, [1.0]), strict=True):
        torch.testing.assert_close(part.state, wanted, rtol=1e-6, atol=1e-7)


def test_what_fails_on_the_host_is_raised_where_it_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no host memory")

    monkeypatch.setattr(FlatAdamW, "update_on_host", fail)
    host = Host()
    host.begin(0)
    with pytest.raises(MemoryError, match="no host memory"):
        host.step.finish()
