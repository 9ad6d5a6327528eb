"""AdamW over bf16 state, which is rounded by chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_kernels.reference import adamw as reference
from engine_kernels.triton import adamw as fused

Step = Callable[..., None]
both = pytest.mark.parametrize("step", [reference.adamw_step, fused.adamw_step], ids=["reference", "triton"])


def draw(n: int, device: torch.device, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(device)


def test_bf16_state_is_the_same_everywhere(device: torch.device) -> None:
    drawn = draw(5000, device, 1), draw(5000, device, 2) / 100, draw(5000, device, 3).square() / 100
    ours, expected = ([x.bfloat16() for x in drawn] for _ in range(2))
    gradient, factor = draw(5000, device, 4).bfloat16(), torch.tensor(0.5, device=device)
    options: dict[str, Any] = {
        "lr": 1e-5,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "step": 7,
        "grad_scale": factor,
    }
    fused.adamw_step(ours[0], gradient, *ours[1:], **options)
    reference.adamw_step(expected[0], gradient, *expected[1:], **options)
    for mine, other in zip(ours, expected, strict=True):
        # The last bits before rounding may differ, which few roundings notice.
        assert float((mine != other).float().mean()) < 2e-3


@both
def test_bf16_weights_keep_steps_that_are_too_small_for_them(step: Step, device: torch.device) -> None:
    weights = torch.ones(4096, dtype=torch.bfloat16, device=device)
    moments = [torch.zeros_like(weights) for _ in range(2)]
    gradient = torch.ones_like(weights)
    for number in range(1, 41):
        step(weights, gradient, *moments, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, step=number)
    # Each step is a fortieth of the distance to the next number in bf16, and lost when it is rounded to nearest.
    assert float(weights.double().mean()) == pytest.approx(1 - 40 * 1e-4, abs=4e-4)


def test_bf16_rounding_leaves_what_is_not_finite() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.3e38, 1.0])
    found = reference.round_by_chance(x, torch.full((5,), 0xFFFF, dtype=torch.int32))
    assert found[:2].tolist() == [float("inf"), -float("inf")]
    assert bool(found[2].isnan())
    assert found[4] == 1.0
