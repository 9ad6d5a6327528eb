"""What no AdamW over flat state takes, and what that of Triton does not take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine_kernels.reference import adamw as reference
from engine_kernels.triton import adamw as fused

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
Step = Callable[..., None]
both = pytest.mark.parametrize("step", [reference.adamw_step, fused.adamw_step], ids=["reference", "triton"])

REFUSED: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"lr": -0.1}, r"lr=-0.1 must not be negative"),
    (lambda: {"eps": math.nan}, r"eps=nan must not be negative"),
    (lambda: {"weight_decay": -1.0}, r"weight_decay=-1.0 must not be negative"),
    (lambda: {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be two numbers in \[0, 1\)"),
    (lambda: {"step": 0}, r"step=0 must be at least 1"),
    (lambda: {"parameter": torch.zeros(2, 3)}, r"parameter of shape \(2, 3\) must be flat"),
    (lambda: {"gradient": torch.zeros(5)}, r"gradient of shape \(5,\) must have parameter's, \(6,\)"),
    (lambda: {"exp_avg": torch.zeros(5)}, r"exp_avg of shape \(5,\) must have"),
    (lambda: {"exp_avg_sq": torch.zeros(6, 1)}, r"exp_avg_sq of shape \(6, 1\) must have"),
    (lambda: {"copy_out": torch.zeros(1, dtype=torch.bfloat16)}, r"copy_out of shape \(1,\) must have"),
    (
        lambda: {"exp_avg": torch.zeros(12)[::2]},
        r"exp_avg with strides \(2,\) must be contiguous: it is written in place",
    ),
    (lambda: {"grad_scale": torch.ones(2)}, r"grad_scale of shape \(2,\) must be one number"),
    (
        lambda: {"partial_square": torch.zeros(2)},
        r"partial_square of shape \(2,\) must be \(1,\), one entry for each 2048",
    ),
    (lambda: {"exp_avg": torch.zeros(6, device="meta")}, r"exp_avg on meta must lie beside parameter, on c"),
    (lambda: {"grad_scale": torch.ones((), device="meta")}, r"grad_scale on meta must lie beside"),
]
REFUSED_BY_TRITON: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (
        lambda: {"parameter": torch.zeros(6).double()},
        r"parameter in torch.float64 must be in torch.float32 or torch.bfloat16",
    ),
    (lambda: {"exp_avg": torch.zeros(6).bfloat16()}, r"exp_avg in torch.bfloat16 must be in torch.float32"),
    (lambda: {"exp_avg_sq": torch.zeros(6).bfloat16()}, r"exp_avg_sq in torch.bfloat16 must be in torch.float32"),
    (
        lambda: {"gradient": torch.zeros(6).double()},
        r"gradient in torch.float64 must be in torch.float32 or torch.bfloat16",
    ),
    (lambda: {"grad_scale": torch.ones(()).double()}, r"grad_scale in torch.float64 must be in torch.float32"),
    (lambda: {"copy_out": torch.zeros(6)}, r"copy_out in torch.float32 must be in torch.bfloat16 or torch.float16"),
    (lambda: {"partial_square": torch.zeros(1).double()}, r"partial_square in torch.float64 must be in torch.float32"),
]


def refuse(step: Step, changes: Callable[[], dict[str, Any]], message: str, device: torch.device) -> None:
    with device:
        tensors = {name: torch.zeros(6) for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")}
        arguments = {**tensors, **OPTIONS, "step": 1, **changes()}
    with pytest.raises(ValueError, match=message):
        step(**arguments)


@both
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals(step: Step, changes: Callable[[], dict[str, Any]], message: str, device: torch.device) -> None:
    refuse(step, changes, message, device)


@pytest.mark.parametrize(("changes", "message"), REFUSED_BY_TRITON)
def test_refusals_of_dtypes(changes: Callable[[], dict[str, Any]], message: str, device: torch.device) -> None:
    refuse(fused.adamw_step, changes, message, device)


def test_a_cpu_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refuse(
        fused.adamw_step,
        dict,
        r"parameter is on cpu: Triton kernels need a CUDA device, or TRITON_INTERPRET=1 set",
        torch.device("cpu"),
    )
